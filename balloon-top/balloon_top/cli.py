# SPDX-License-Identifier: GPL-2.0-or-later
'''The program: options, terminal and loop'''

import argparse
import asyncio
import collections
import contextlib
import json
import logging
import os
import signal
import sys
import termios
import time
import tty

from rich.console import Console
from rich.live import Live

from . import model, view
from .errors import SourceError, TIMEOUT
from .guest import Guest
from .source import LibvirtDomain, QmpSocket, running_domains

# How long a slow guest may delay what is shown of the others, in seconds
PATIENCE = 0.5

# How many samples --plot shows
HISTORY = 600

EPILOG = '''
"q" or Ctrl-C ends the program.  The exit code is 1 if nothing is known about
any guest, and 2 if the options are wrong.
'''


def positive(kind, least):
    '''A type for argparse: a number that is large enough'''
    def convert(text):
        value = kind(text)
        # Not "<", for NaN
        if not least <= value <= 86400 * 365:
            raise ValueError
        return value
    convert.__name__ = f'number (at least {least})'
    return convert


def parse_args(argv):
    '''Parse the options.'''
    parser = argparse.ArgumentParser(
        prog='qemu-balloon-top', epilog=EPILOG,
        description='Show the memory balloons of VMs.')
    parser.add_argument('sockets', metavar='SOCKET', nargs='*',
                        help='the UNIX socket of a QMP monitor')
    parser.add_argument('--libvirt', action='store_true',
                        help='show all domains that libvirt runs')
    parser.add_argument('--connect', metavar='URI', default='qemu:///system',
                        help='which libvirt (default: %(default)s)')
    parser.add_argument('--interval', metavar='SECONDS', default=2,
                        type=positive(float, 0.1),
                        help='time between samples (default: %(default)s)')
    parser.add_argument('--once', action='store_true',
                        help='take two samples, print one table, and end')
    parser.add_argument('--count', metavar='N', type=positive(int, 1),
                        help='end after N samples')
    parser.add_argument('--json', action='store_true',
                        help='print a JSON object a line for each guest and'
                             ' sample')
    parser.add_argument('--plot', metavar='GUEST',
                        help='show one guest over time')
    parser.add_argument('--sort', metavar='COLUMN', default='guest',
                        choices=model.SORT_KEYS,
                        help='one of %(choices)s (default: %(default)s)')
    parser.add_argument('--svg', metavar='FILE',
                        help='with --once, or --plot and --count: write a'
                             ' picture')
    parser.add_argument('--poll', metavar='SECONDS', type=positive(int, 1),
                        help='have QEMU ask the guests for statistics while'
                             ' the program runs, unless it does as often')
    args = parser.parse_args(argv)
    if args.libvirt == bool(args.sockets):
        parser.error('name either sockets or --libvirt')
    if args.once and args.count:
        parser.error('--once and --count exclude each other')
    if args.json and (args.plot or args.svg):
        parser.error('--json excludes --plot and --svg')
    if args.svg and not args.once and not (args.plot and args.count):
        parser.error('--svg needs --once, or --plot and --count')
    if args.once:
        args.count = 2
    if args.plot and not args.count and not sys.stdout.isatty():
        parser.error('without a terminal, --plot needs --count or --once')
    return args


class Terminal:
    '''The live display, and the keyboard'''

    def __init__(self, console, stop):
        self._stop = stop
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._saved = None

    def _on_key(self):
        data = os.read(0, 64)
        if b'q' in data or b'Q' in data:
            self._stop.set()
        if not data:
            asyncio.get_running_loop().remove_reader(0)

    def _on_stop(self):
        '''Ctrl-Z: leave the terminal to the shell.'''
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        # "fg"
        self._enter()

    def _enter(self):
        if sys.stdin.isatty():
            self._saved = termios.tcgetattr(0)
            tty.setcbreak(0)
        self._live.start(refresh=True)

    def _leave(self):
        self._live.stop()
        if self._saved:
            termios.tcsetattr(0, termios.TCSADRAIN, self._saved)

    def __enter__(self):
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTSTP, self._on_stop)
        loop.add_signal_handler(signal.SIGWINCH, self._live.refresh)
        self._enter()
        if self._saved:
            loop.add_reader(0, self._on_key)
        return self

    def __exit__(self, *_):
        if self._saved:
            asyncio.get_running_loop().remove_reader(0)
        self._leave()

    def show(self, renderable):
        '''Show something instead of what was shown.'''
        self._live.update(renderable, refresh=True)


class Output(Console):
    '''What is printed to'''

    def on_broken_pipe(self):
        # rich would end the program at once.
        raise BrokenPipeError


def make_console():
    '''What is printed to: a terminal or anything else'''
    width = None
    if not sys.stdout.isatty() and 'COLUMNS' not in os.environ:
        width = view.WIDTH
    return Output(highlight=False, markup=False, emoji=False, width=width)


class Program:
    '''What the options say'''

    def __init__(self, args):
        self.args = args
        self.stop = asyncio.Event()
        self.guests = [Guest(QmpSocket(path, name), args.poll)
                       for path, name in model.names(args.sockets)]
        self.console = make_console()
        self.history = collections.deque(maxlen=HISTORY)
        self._listing = None

    async def list_domains(self):
        '''Note which domains run.'''
        names = await running_domains(self.args.connect)
        known = {guest.source.name: guest.source for guest in self.guests}
        for name, source in known.items():
            source.is_running = name in names
        self.guests += [
            Guest(LibvirtDomain(self.args.connect, name), self.args.poll)
            for name in names if name not in known]

    def refresh_domains(self):
        '''Start to list the domains, unless that has not ended yet.'''
        if self._listing and self._listing.done():
            # libvirt may have been restarted; the guests have rows anyway.
            self._listing.exception()
            self._listing = None
        if self._listing is None:
            self._listing = asyncio.create_task(self.list_domains())

    async def sample(self, patience):
        '''Take a sample of each guest; return the records.'''
        tasks = [guest.update() for guest in self.guests]
        if tasks:
            # This does not cancel those that are slower.
            waits = [asyncio.create_task(self.stop.wait()), asyncio
                     .create_task(asyncio.wait(tasks, timeout=patience))]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        return [guest.current() for guest in self.guests]

    async def _pause(self, until):
        '''Wait.'''
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0, until - time.monotonic())):
                await self.stop.wait()

    def _picture(self, records):
        '''What is to be shown of all guests, or of the plotted one'''
        if not self.args.plot:
            return view.Table(model.sort(records, self.args.sort))
        index = model.find(records, self.args.plot)
        # Its name may have been another one.
        if index is not None:
            self.history.append(records[index])
        elif not self.history:
            names = ', '.join(rec['guest'] for rec in records)
            raise SourceError(f'no guest has the name "{self.args.plot}":'
                              f' there are {names or "none"}')
        return view.Plot(list(self.history))

    def _print(self, records, picture, is_last):
        '''Print without a terminal, or for --once.'''
        if self.args.json:
            for rec in records:
                print(json.dumps(rec), flush=True)
        elif is_last or not (self.args.once or self.args.plot):
            self.console.print(picture)
            if not is_last:
                self.console.print()
            # Somebody may read it already.
            sys.stdout.flush()

    async def _loop(self, terminals):
        '''Take samples, and show them; return the exit code.'''
        args = self.args
        is_live = sys.stdout.isatty() and not args.json and not args.once
        # Each command is another process.
        first = 4 * TIMEOUT if args.libvirt else TIMEOUT + 1
        terminal = None
        number = 0
        records = []
        due = time.monotonic()
        while number != args.count:
            number += 1
            if args.libvirt and number > 1:
                self.refresh_domains()
            records = await self.sample(
                first if number == 1 or args.once else PATIENCE)
            if self.stop.is_set():
                return 0
            if number == 1 and fails(records):
                for rec in records:
                    complain(f'{rec["source"]}: {rec["error"]}')
                return 1
            picture = self._picture(records)
            if is_live:
                terminal = terminal or terminals.enter_context(
                    Terminal(self.console, self.stop))
                terminal.show(picture)
            else:
                self._print(records, picture, number == args.count)
            if number != args.count:
                due = max(due + args.interval, time.monotonic())
                await self._pause(due)
        if args.svg:
            view.save(picture, view.WIDTH, args.svg)
        return int(fails(records))

    async def run(self):
        '''Run until it is stopped; return the exit code.'''
        loop = asyncio.get_running_loop()
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            loop.add_signal_handler(number, self.stop.set)
        try:
            if self.args.libvirt:
                await self.list_domains()
            with contextlib.ExitStack() as terminals:
                return await self._loop(terminals)
        finally:
            stops = [guest.stop() for guest in self.guests]
            for guest, why in zip(self.guests, await asyncio.gather(*stops)):
                if why:
                    complain(f'{guest.source.path}: {why}')


def fails(records):
    '''Whether nothing is known about any guest'''
    return bool(records) and all(rec['error'] for rec in records)


def complain(text):
    '''Print an error.'''
    print('qemu-balloon-top: ' + model.clean(text, 1000), file=sys.stderr)


async def run(args):
    '''Run the program in a loop of asyncio; return the exit code.'''
    return await Program(args).run()


def main(argv=None):
    '''Run the program; return the exit code.'''
    args = parse_args(argv)
    # What a terminal cannot show is better than no output.
    sys.stdout.reconfigure(errors='replace')
    # Lost connections are in the table.
    logging.getLogger('asyncio').setLevel(logging.CRITICAL + 1)
    try:
        return asyncio.run(run(args))
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # Python would complain about it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SourceError as exc:
        complain(str(exc))
    except OSError as exc:
        complain(f'{exc.filename}: {exc.strerror}' if exc.filename
                 else str(exc))
    except termios.error as exc:
        complain(f'terminal: {exc}')
    return 1
