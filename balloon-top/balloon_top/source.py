# SPDX-License-Identifier: GPL-2.0-or-later
'''How to get at the monitor of a QEMU'''

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess

from qemu.qmp import (
    ExecInterruptedError, ExecuteError, QMPClient, StateError)
from qemu.qmp.qmp_client import GreetingError, NegotiationError

from .errors import CommandError, Ended, SourceError, TIMEOUT

IN_USE = ('no greeting from QEMU: another program, for example libvirt, uses'
          ' this socket; use --libvirt, or give QEMU a second -qmp socket')
NO_QMP = 'something other than QMP is behind this socket'

# It would print to the terminal; all errors become rows.
logging.getLogger('qemu.qmp').addHandler(logging.NullHandler())
logging.getLogger('qemu.qmp').propagate = False


# What the library raises if the other side is gone
DISCONNECTED = (EOFError, OSError, ExecInterruptedError, StateError)

CONNECT_ERRORS = [
    (FileNotFoundError, Ended, 'this socket does not exist'),
    (ConnectionRefusedError, Ended,
     'nobody listens on this socket: its QEMU has ended'),
    (PermissionError, SourceError, 'permission denied'),
    # Other clients wait for their turn.
    (BlockingIOError, SourceError, IN_USE),
]


class QmpSocket:
    '''A QEMU with a QMP socket'''

    # QEMU does
    knows_name = False

    def __init__(self, path, name):
        self.path = path
        # unless QEMU has another one
        self.name = name
        self._client = None

    def _connect(self):
        '''Return a connected socket.'''
        # asyncio takes a socket with too many clients for one that is
        # connected.  Connecting to a UNIX socket takes no time.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not stat.S_ISSOCK(os.stat(self.path).st_mode):
                raise SourceError('this is not a socket')
            sock.setblocking(False)
            sock.connect(self.path)
        except SourceError:
            sock.close()
            raise
        except OSError as exc:
            sock.close()
            for kind, error, why in CONNECT_ERRORS:
                if isinstance(exc, kind):
                    raise error(why) from exc
            raise SourceError(exc.strerror or str(exc)) from exc
        return sock

    async def open(self):
        '''Connect, unless it is connected.'''
        if self._client:
            return
        sock = self._connect()
        client = QMPClient()
        # Nobody reads events, which would need more and more memory.
        client.events.event_filter = lambda event: False
        try:
            async with asyncio.timeout(TIMEOUT):
                await client.connect(sock)
        except TimeoutError as exc:
            raise SourceError(IN_USE) from exc
        except Exception as exc:
            cause = getattr(exc, 'exc', exc)
            if isinstance(cause, (GreetingError, NegotiationError)):
                raise SourceError(NO_QMP) from exc
            if isinstance(cause, (EOFError, OSError)):
                raise Ended('QEMU has closed the connection') from exc
            raise SourceError(f'{NO_QMP}: {exc}') from exc
        finally:
            if client.runstate.name != 'RUNNING':
                sock.close()
        self._client = client

    async def execute(self, command, **arguments):
        '''Execute a command.'''
        if not self._client:
            raise SourceError('there is no connection')
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as exc:
            raise CommandError(str(exc)) from exc
        except Exception as exc:
            cause = await self.close() or exc
            if isinstance(cause, DISCONNECTED):
                raise Ended('has ended') from exc
            raise SourceError(NO_QMP) from exc

    async def close(self):
        '''Disconnect; return why it was disconnected before, if it was.'''
        client, self._client = self._client, None
        if client:
            try:
                await client.disconnect()
            # It may be anything that the tasks in it have met.
            # pylint: disable-next=broad-exception-caught
            except Exception as exc:
                return exc
        return None


# How many virsh's may run at the same time
VIRSHS = asyncio.Semaphore(4)


async def virsh(uri, *arguments):
    '''Run virsh; return its output.'''
    async with VIRSHS:
        return await run_virsh(uri, *arguments)


async def run_virsh(uri, *arguments):
    '''Run virsh now; return its output.'''
    # The subprocesses of asyncio may hang if they are cancelled as they start.
    try:
        # pylint: disable-next=consider-using-with
        process = subprocess.Popen(
            ['virsh', '-q', '-c', uri, *arguments], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # Ctrl-C is for this program, which may have to restore something.
            start_new_session=True)
    except FileNotFoundError as exc:
        raise SourceError('--libvirt needs virsh, which is not installed') \
            from exc
    except OSError as exc:
        raise SourceError(f'virsh: {exc.strerror}') from exc
    try:
        out, err = await asyncio.to_thread(process.communicate)
    finally:
        if process.poll() is None:
            # With a remote libvirt, also ssh
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = err.decode(errors='replace').strip().splitlines()
        why = lines[-1] if lines else f'exit code {process.returncode}'
        raise SourceError('virsh: ' + why.removeprefix('error: '))
    return out.decode(errors='replace')


async def running_domains(uri):
    '''The names of the domains that run'''
    out = await virsh(uri, 'list', '--name')
    return [line for line in out.splitlines() if line.strip()]


class LibvirtDomain:
    '''A QEMU that libvirt has started'''

    knows_name = True

    def __init__(self, uri, name):
        self.uri = uri
        self.path = self.name = name
        self.is_running = True

    async def open(self):
        '''See whether it runs.'''
        if not self.is_running:
            raise Ended('has ended')

    async def execute(self, command, **arguments):
        '''Execute a command.'''
        request = json.dumps({'execute': command, 'arguments': arguments})
        # After "--", a name may begin with "-".
        out = await virsh(self.uri, 'qemu-monitor-command', '--', self.name,
                          request)
        try:
            reply = json.loads(out)
        # There may be too many brackets, or digits.
        except (ValueError, RecursionError) as exc:
            raise SourceError('virsh: the reply is not JSON') from exc
        if not isinstance(reply, dict) or 'return' not in reply:
            raise CommandError(out)
        return reply['return']

    async def close(self):
        '''There is nothing to close.'''
