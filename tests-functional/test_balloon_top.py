#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qemu-balloon-top with a Linux guest
'''What qemu-balloon-top shows of guests'''

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
import time

from virtio_balloon_guest import MIB
from virtio_balloon_migration import BalloonLinuxTest

# How long the program may take, in seconds: the host may be busy.
TIMEOUT = 120

# The sequences of a terminal
SEQUENCE = re.compile(r'\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])')
ENTER, LEAVE = '\x1b[?1049h', '\x1b[?1049l'
HIDE, SHOW = '\x1b[?25l', '\x1b[?25h'

NUMBER = r'(-|[\d.]+)'
ROW = re.compile(rf'^guest1 +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}'
                 rf' +(-|\d+ \w+) +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}'
                 r' +(.*?) *$', re.MULTILINE)
COLUMNS = ['target', 'actual', 'free', 'available', 'age', 'in', 'out',
           'reported', 'unasked', 'summary']

IN_USE = 'another program, for example libvirt, uses this socket'
GOOD = 'the balloon has the size that was asked for'


def environment():
    '''Without what is for the tests, but not for users'''
    env = {key: value for key, value in os.environ.items()
           if key not in ('PYTHONPATH', 'COLUMNS', 'LINES', 'NO_COLOR')}
    return {**env, 'TERM': 'xterm-256color', 'PYTHONDONTWRITEBYTECODE': '1'}


class Terminal:
    '''The program in a pseudo terminal'''

    def __init__(self, *command, columns=140):
        self._parent, child = pty.openpty()
        self._child = child
        fcntl.ioctl(child, termios.TIOCSWINSZ,
                    struct.pack('HHHH', 24, columns, 0, 0))
        self._attributes = termios.tcgetattr(child)
        # pylint: disable-next=consider-using-with
        self._process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child,
            env=environment(), start_new_session=True)
        self._output = b''
        # Otherwise, the program would wait until this test reads.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        '''Read until there are no more users of the terminal.'''
        while True:
            try:
                data = os.read(self._parent, 4096)
            except OSError:
                return
            self._output += data

    def output(self):
        '''What was printed'''
        return self._output.decode(errors='replace')

    def rows(self):
        '''What was shown of the guest, one dictionary for each time'''
        text = SEQUENCE.sub('', self.output()).replace('\r', '')
        return [dict(zip(COLUMNS, match.groups()))
                for match in ROW.finditer(text)]

    def press(self, key):
        '''Press a key.'''
        os.write(self._parent, key.encode())

    def send_signal(self, number):
        '''
        Send a signal as if a key had been pressed: the terminal is not the
        controlling one of the program.
        '''
        self._process.send_signal(number)

    def is_stopped(self):
        '''Whether the program is stopped, as after Ctrl-Z'''
        with open(f'/proc/{self._process.pid}/stat',
                  encoding='ascii') as stat:
            return stat.read().rpartition(')')[2].split()[0] == 'T'

    def wait(self):
        '''Wait for the program to end; return the exit code.'''
        return self._process.wait(TIMEOUT)

    def is_restored(self):
        '''Whether the terminal has the attributes that it had'''
        return termios.tcgetattr(self._child) == self._attributes

    def close(self):
        '''End the program, if it has not ended.'''
        self._process.kill()
        self._process.wait()
        os.close(self._child)
        self._reader.join()
        os.close(self._parent)


class VirtioBalloonTop(BalloonLinuxTest):
    '''The program shows what happens.'''

    def setUp(self):
        self.program = os.getenv('VIRTIO_BALLOON_TOP')
        super().setUp()
        if not self.program:
            self.skipTest('set VIRTIO_BALLOON_TOP to the path of'
                          ' qemu-balloon-top')
        if os.getenv('BALLOON_DEVICE') == 'c':
            self.skipTest('the C device does not tell what is checked')
        self.path = f'{self.socket_dir().name}/top'

    def launch_guest(self):
        '''Boot a guest with another QMP socket.'''
        self.launch('', '-name', 'guest1', '-qmp',
                    f'unix:{self.path},server=on,wait=off')

    def run_top(self, *args):
        '''Run the program without a terminal.'''
        return subprocess.run(
            [self.program, *args], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, env=environment(),
            timeout=TIMEOUT, check=False)

    def start_json(self, *args):
        '''Run the program in the background; return the process.'''
        # pylint: disable-next=consider-using-with
        process = subprocess.Popen(
            [self.program, '--json', '--interval', '0.5', *args],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            env=environment())
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def read_until(self, process, condition):
        '''Read records until one meets a condition; return it.'''
        deadline = time.monotonic() + TIMEOUT
        for line in process.stdout:
            rec = json.loads(line)
            if condition(rec):
                return rec
            self.assertLess(time.monotonic(), deadline, line)
        return self.fail('the program has ended')

    def open_terminal(self, *args, **kwargs):
        '''Run the program in a terminal.'''
        terminal = Terminal(self.program, *args, **kwargs)
        self.addCleanup(terminal.close)
        return terminal

    def wait_row(self, terminal, condition, what):
        '''Wait until the guest is shown in some way.'''
        def condition_met():
            found = [row for row in terminal.rows() if condition(row)]
            return found[-1] if found else None
        try:
            return self.wait_for(condition_met, what, TIMEOUT)
        except AssertionError:
            self.log.error('output: %r', terminal.output()[-3000:])
            raise

    def check_restored(self, terminal):
        '''The program, which has stopped, has left the terminal as it was.'''
        def ended(before, after):
            output = terminal.output()
            return -1 < output.rfind(before) < output.rfind(after)
        # The thread that reads may not have seen yet what was written last.
        self.wait_for(lambda: ended(ENTER, LEAVE) and ended(HIDE, SHOW),
                      'the end of the output', TIMEOUT)
        self.assertTrue(terminal.is_restored())

    def interval(self):
        '''The interval of the statistics'''
        return self.host_property('guest-stats-polling-interval')

    def check_table(self):
        '''The table in a terminal, while the balloon is inflated'''
        terminal = self.open_terminal('--interval', '0.3', '--poll', '1',
                                      self.path)
        full = str(self.RAM // MIB)
        row = self.wait_row(
            terminal, lambda row: '-' not in (row['available'], row['in']),
            'statistics of the guest')
        self.assertEqual((row['target'], row['actual'], row['summary']),
                         (full, full, GOOD))
        self.assertEqual(row['unasked'], '0')
        self.assertLess(int(row['free']), self.RAM // MIB)
        self.assertEqual(self.interval(), 1)

        self.set_balloon(self.TARGET)
        target = str(self.TARGET // MIB)
        self.wait_row(terminal, lambda row: row['target'] == target
                      and float(row['in'].replace('-', '0')) > 0, 'a rate')
        row = self.wait_row(
            terminal, lambda row: row['actual'] == target
            and row['in'] == '0.0' and int(row['available']) < self.TARGET
            // MIB, 'the size')
        self.assertEqual(row['summary'], GOOD)

        terminal.press('x')
        terminal.press('q')
        self.assertEqual(terminal.wait(), 0)
        self.check_restored(terminal)
        self.assertEqual(self.interval(), 0)

    def check_narrow(self):
        '''A terminal with 80 columns; Ctrl-Z, and Ctrl-C'''
        terminal = self.open_terminal('--interval', '0.3', self.path,
                                      columns=80)
        summary = f'guest1: {GOOD}'
        self.wait_for(lambda: summary in terminal.output(), 'the summary',
                      TIMEOUT)
        terminal.send_signal(signal.SIGTSTP)
        self.wait_for(terminal.is_stopped, 'the program to stop', TIMEOUT)
        self.check_restored(terminal)
        before = terminal.output().count(summary)
        terminal.send_signal(signal.SIGCONT)
        self.wait_for(lambda: terminal.output().count(summary) > before + 1,
                      'the program to continue', TIMEOUT)
        terminal.send_signal(signal.SIGINT)
        self.assertEqual(terminal.wait(), 0)
        self.check_restored(terminal)

    def check_plot(self):
        '''A plot in a terminal'''
        terminal = self.open_terminal('--interval', '0.3', '--plot', 'guest1',
                                      self.path)
        target = f'target {self.TARGET // MIB}'
        self.wait_for(lambda: target in terminal.output()
                      and GOOD in terminal.output(), 'the plot', TIMEOUT)
        terminal.press('q')
        self.assertEqual(terminal.wait(), 0)
        self.check_restored(terminal)

    def check_json(self):
        '''Records'''
        result = self.run_top('--json', '--count', '2', '--interval', '0.5',
                              self.path)
        self.assertEqual((result.returncode, result.stderr), (0, ''))
        records = [json.loads(line) for line in result.stdout.splitlines()]
        self.assertEqual(len(records), 2)
        for rec in records:
            self.assertEqual(
                {key: rec[key] for key in ('guest', 'source', 'error',
                                           'device', 'driver', 'target',
                                           'actual', 'summary')},
                {'guest': 'guest1', 'source': self.path, 'error': None,
                 'device': 'Rust', 'driver': 'ready', 'target': self.TARGET,
                 'actual': self.TARGET, 'summary': GOOD})
        self.assertEqual([rec['inflate-rate'] for rec in records], [None, 0])

    def check_pipe(self):
        '''A table without a terminal, and a picture'''
        svg = f'{self.workdir}/top.svg'
        result = self.run_top('--once', '--interval', '0.5', '--svg', svg,
                              self.path)
        self.assertEqual((result.returncode, result.stderr), (0, ''))
        self.assertTrue(result.stdout.replace('\n', '').isprintable())
        rows = ROW.findall(result.stdout)
        self.assertEqual(len(rows), 1, result.stdout)
        self.assertEqual(rows[0][1], str(self.TARGET // MIB))
        with open(svg, encoding='utf-8') as file:
            picture = file.read()
        self.assertIn('guest1', picture)
        self.assertNotIn('url("http', picture)

    def check_in_use(self):
        '''Another client is connected.'''
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.path)
            self.assertTrue(client.recv(1))
            result = self.run_top(self.path)
        self.assertEqual((result.returncode, result.stdout), (1, ''))
        self.assertIn(f'{self.path}: no greeting', result.stderr)
        self.assertIn(IN_USE, result.stderr)
        self.assertEqual(result.stderr.count('\n'), 1)

    def check_slow(self):
        '''One QEMU does not answer, and another does; then it ends.'''
        other = self.get_vm('-name', 'guest2', '-S', '-qmp',
                            f'unix:{self.path}2,server=on,wait=off',
                            name='guest2')
        other.launch()
        process = self.start_json(self.path, self.path + '2')
        self.read_until(process, lambda rec: rec['guest'] == 'guest1'
                        and not rec['error'])
        os.kill(self.vm.get_pid(), signal.SIGSTOP)
        try:
            self.read_until(process, lambda rec: rec['guest'] == 'guest1' and
                            'has not answered for' in (rec['error'] or ''))
            rec = self.read_until(process, lambda rec: rec['guest']
                                  == 'guest2')
            self.assertEqual(rec['summary'], 'no balloon device')
        finally:
            os.kill(self.vm.get_pid(), signal.SIGCONT)
        self.read_until(process, lambda rec: rec['guest'] == 'guest1'
                        and not rec['error'])
        self.vm.shutdown()
        self.read_until(process, lambda rec: rec['guest'] == 'guest1'
                        and rec['error'] == 'has ended')
        self.read_until(process, lambda rec: rec['guest'] == 'guest2')
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(TIMEOUT), 0)

    def test_guest(self):
        '''A guest while it runs, and when it ends'''
        self.launch_guest()
        for check in (self.check_table, self.check_narrow, self.check_plot,
                      self.check_json, self.check_pipe, self.check_in_use,
                      self.check_slow):
            with self.part(check.__doc__):
                check()

    def test_errors(self):
        '''Sockets without a QEMU'''
        base = self.socket_dir().name
        with open(f'{base}/file', 'w', encoding='ascii'):
            pass
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f'{base}/dead')
        paths = [f'{base}/{name}' for name in ('absent', 'dead', 'file')]
        for path, why in zip(paths, ('does not exist', 'nobody listens',
                                     'is not a socket')):
            result = self.run_top(path)
            self.assertEqual((result.returncode, result.stdout), (1, ''))
            self.assertRegex(result.stderr, rf'^.*: {path}: .*{why}.*\n$')
        result = self.run_top('--once', *paths)
        self.assertEqual(result.returncode, 1)
        self.assertEqual(result.stderr.count('\n'), 3)


if __name__ == '__main__':
    BalloonLinuxTest.main()
