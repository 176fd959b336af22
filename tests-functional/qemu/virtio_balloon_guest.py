# SPDX-License-Identifier: GPL-2.0-or-later
#
# A Linux guest with a memory balloon
'''Base class for tests that boot Linux with virtio-balloon'''

import os
import re
import time

from qemu_test import QemuSystemTest

MIB = 1 << 20

# The value of a statistic that the driver did not provide
UNSET_STATS_VALUE = 18446744073709551615


class BalloonGuestTest(QemuSystemTest):
    '''
    Boots the kernel and initramfs that BALLOON_GUEST_KERNEL and
    BALLOON_GUEST_INITRD point to.  The latter has to start a shell on the
    serial console, after having printed "Guest is ready", and to let
    processes allocate more memory than there is.
    '''

    # A float, because QEMUMachine.event_wait() waits forever with other types
    timeout = 300.0

    RAM = 512 * MIB
    # The size of the guest when the balloon is inflated
    TARGET = 160 * MIB
    # The memory that a process uses then
    HOG = 250 * MIB

    BALLOON = '/machine/peripheral/balloon0'

    _console = b''

    def setUp(self):
        super().setUp()
        self.kernel = os.getenv('BALLOON_GUEST_KERNEL')
        self.initrd = os.getenv('BALLOON_GUEST_INITRD')
        if not self.kernel or not self.initrd:
            self.skipTest('no guest: use "cargo xtask test functional", or set'
                          ' BALLOON_GUEST_KERNEL and BALLOON_GUEST_INITRD')

    def launch(self, options='', *args):
        '''
        Boot a guest whose balloon has the given options, for example
        ",deflate-on-oom=on".
        '''
        self.set_machine('pc')
        self.require_accelerator('tcg')
        self._console = b''
        self.vm.set_console()
        self.vm.add_args('-accel', 'tcg',
                         '-m', str(self.RAM // MIB),
                         '-kernel', self.kernel,
                         '-initrd', self.initrd,
                         '-append', 'console=ttyS0 loglevel=1 panic=-1',
                         '-device',
                         'virtio-balloon-pci,id=balloon0' + options,
                         *args)
        self.vm.launch()
        self.wait_console(rb'Guest is ready')
        self.prepare_guest()

    def prepare_guest(self):
        '''Prepare the guest after each boot.'''
        # the console should not wrap or echo what is sent
        self.run_in_guest('stty -echo cols 1000')
        self.wait_for(lambda: self.guest_features() is not None,
                      'the balloon driver')

    def wait_console(self, pattern, timeout=None):
        '''Read the console until the pattern appears; return the match.'''
        deadline = time.monotonic() + (timeout or self.timeout)
        sock = self.vm.console_socket
        while True:
            match = re.search(pattern, self._console)
            if match:
                self._console = self._console[match.end():]
                return match
            left = deadline - time.monotonic()
            if left <= 0:
                self.fail(f'no {pattern} on the console, but: '
                          + self._console[-2000:].decode(errors='replace'))
            sock.settimeout(left)
            try:
                data = sock.recv(4096)
            except TimeoutError:
                continue
            self.assertTrue(data, 'QEMU has closed the console')
            self._console += data

    def run_in_guest(self, command, timeout=None):
        '''Run a shell command; return the exit code and the output.'''
        # With the quotes, the echo of the command does not match the pattern
        self.vm.console_socket.sendall(
            f'echo "==""begin"; {command}; echo "==""end" $?\n'.encode())
        match = self.wait_console(
            rb'==begin\r?\n(?s:(.*?))==end (\d+)\r?\n', timeout)
        output = match.group(1).decode(errors='replace').replace('\r', '')
        return int(match.group(2)), output

    def wait_for(self, condition, what, timeout=None):
        '''Wait until condition() is true, and return what it returned.'''
        deadline = time.monotonic() + (timeout or self.timeout)
        while True:
            result = condition()
            if result:
                return result
            self.assertLess(time.monotonic(), deadline,
                            f'still waiting for {what}')
            time.sleep(0.2)

    def guest_sleep(self, seconds):
        '''
        Let time pass in the guest, so that delayed work in it gets done.  On a
        busy host, this takes longer.
        '''
        self.assertEqual(self.run_in_guest(f'sleep {seconds}')[0], 0)

    def actual(self):
        '''The memory that the guest has, in bytes'''
        return self.vm.cmd('query-balloon')['actual']

    def set_balloon(self, value):
        '''Set the memory size of the guest, and wait until it is reached.'''
        self.vm.cmd('balloon', value=value)
        self.wait_for(lambda: self.actual() == value,
                      f'the guest to have {value} bytes')

    def guest_kernel(self):
        '''The release of the kernel in the guest'''
        return self.run_in_guest('uname -r')[1].strip()

    def guest_features(self):
        '''
        The features that the driver has negotiated, as a string with one
        character for each bit, bit 0 first; None if there is no driver.
        Since Linux 6.18, there are 128 of them.
        '''
        _, out = self.run_in_guest(
            'cat /sys/bus/virtio/drivers/virtio_balloon/virtio*/features')
        out = out.strip()
        return out if re.fullmatch('[01]{64}([01]{64})?', out) else None

    def host_property(self, name):
        '''A property of the device'''
        return self.vm.cmd('qom-get', path=self.BALLOON, property=name)

    def use_memory(self):
        '''
        Run a process in the guest that uses much memory; return its exit code.
        '''
        return self.run_in_guest(
            f'dd if=/dev/zero of=/dev/null bs={self.HOG} count=1')[0]

    def oom_scenario(self):
        '''
        Inflate the balloon, then have a process use more memory than is left.
        Return what happened.
        '''
        result = {
            'kernel': self.guest_kernel(),
            'bit 2': self.guest_features()[2],
        }
        self.set_balloon(self.TARGET)
        result['before'] = self.actual()
        result['exit'] = self.use_memory()
        if result['exit'] == 0:
            # The driver may update the size of the balloon a moment later
            self.wait_for(lambda: self.actual() > self.HOG, 'deflation')
        else:
            self.guest_sleep(1)
        result['after'] = self.actual()
        _, log = self.run_in_guest('dmesg')
        result['killed'] = [line for line in log.splitlines()
                            if 'Out of memory: Killed' in line]
        return result
