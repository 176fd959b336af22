#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Linux guests whose balloon does nothing, and what balloon-status says
'''Functional tests of balloon-status with a Linux guest'''

import json
import os
import resource
import sys
import time

from qemu.machine.machine import VMLaunchFailure

from virtio_balloon_guest import MIB
from virtio_balloon_migration import BalloonLinuxTest
from virtio_balloon_vfio_user import NullDevice

GOOD = 'the balloon has the size that was asked for'


class VirtioBalloonStatus(BalloonLinuxTest):
    '''
    Situations in which a user wonders why a balloon does nothing.  Each is
    found with one command.
    '''

    # For how long nothing must happen, in seconds
    QUIET = 3

    # What a file in the guest needs, so that the target cannot be reached
    FILE = 300 * MIB

    # When the device mentions that statistics are missing, in seconds
    SLOW = 5

    found = []

    @classmethod
    def tearDownClass(cls):
        '''Print all statuses as comments, which TAP ignores.'''
        for what, status in cls.found:
            print(f'# {what}: {json.dumps(status)}')
        sys.stdout.flush()
        super().tearDownClass()

    def setUp(self):
        super().setUp()
        if os.getenv('BALLOON_DEVICE') == 'c':
            self.skipTest('the implementation in C has no balloon-status')

    def status(self):
        '''The one command'''
        return self.vm.cmd('qom-get', path=self.BALLOON,
                           property='balloon-status')

    def check_finds(self, what, summary):
        '''
        The status has the reason for which the balloon does nothing.  Return
        all of it.
        '''
        status = self.status()
        self.log.info('%s: %s', what, json.dumps(status, indent=2))
        self.found.append((what, status))
        self.assertEqual(status['summary'], summary)
        return status

    def wait_good(self):
        '''When the reason is gone, the balloon does what it should.'''
        self.wait_for(lambda: self.status()['summary'] == GOOD,
                      'the balloon to have its size')

    def ask(self, target):
        '''Set the memory size of the guest; do not wait.'''
        self.vm.cmd('balloon', value=target)

    def wait_for_standstill(self):
        '''Wait until the size of the balloon does not change any more.'''
        size, since = self.actual(), time.monotonic()

        def settled():
            nonlocal size, since
            # The driver still finds a page now and then.
            if abs(self.actual() - size) >= MIB:
                size, since = self.actual(), time.monotonic()
            return time.monotonic() - since > self.QUIET

        self.wait_for(settled, 'the balloon to stand still')

    def test_no_driver(self):
        '''The guest has no balloon driver.'''
        self.launch()
        # Linux sets the status bit ACKNOWLEDGE for each virtio device, with or
        # without a driver.
        self.guest_ok('rmmod virtio_balloon')
        self.ask(self.TARGET)
        self.guest_sleep(self.QUIET)
        self.assertEqual(self.actual(), self.RAM)

        status = self.check_finds('no driver',
                                  'the guest has no balloon driver')
        self.assertEqual(status['driver'], 'none')
        self.assertEqual(status['features'], [])
        self.assertEqual(status['target'], self.TARGET)
        self.assertEqual(status['actual'], self.RAM)

        self.guest_ok('insmod /modules/*-virtio_balloon.ko')
        self.wait_good()
        self.assertEqual(self.actual(), self.TARGET)

    def test_guest_needs_memory(self):
        '''The guest does not have as much free memory as it is asked for.'''
        self.launch(',deflate-on-oom=off')
        # There is no swap space, so that the file stays in memory.
        self.guest_ok('mkdir -p /data'
                      ' && mount -t tmpfs -o size=100% data /data'
                      ' && dd if=/dev/zero of=/data/file bs=1M'
                      f' count={self.FILE // MIB}')
        self.ask(self.TARGET)
        # From here on, the guest may kill processes that need memory, so it
        # gets no commands.
        self.wait_for(lambda: self.actual() < self.RAM, 'inflation')
        self.wait_for_standstill()

        status = self.check_finds(
            'the guest needs its memory',
            'the guest has not given back as much memory as it is asked for')
        self.assertEqual(status['driver'], 'ready')
        self.assertNotIn('deflate-on-oom', status['features'])
        self.assertEqual(status['target'], self.TARGET)
        self.assertGreater(status['actual'], self.FILE)

        # The host asks for less, and the guest removes the file.
        self.set_balloon(self.RAM)
        self.wait_good()
        self.guest_ok('rm /data/file')
        self.set_balloon(self.TARGET)
        self.wait_good()

    def test_stopped(self):
        '''The VM is stopped.'''
        self.launch()
        self.vm.cmd('stop')
        self.ask(self.TARGET)

        status = self.check_finds('stopped', 'the VM is stopped')
        self.assertEqual(status['driver'], 'ready')
        self.assertEqual(status['target'], self.TARGET)
        self.assertEqual(status['actual'], self.RAM)

        self.vm.cmd('cont')
        self.wait_good()
        self.assertEqual(self.actual(), self.TARGET)

    def crash(self):
        '''
        Crash the guest.  It does not reboot, but its interrupt handlers still
        run, so that only what the driver does in a kernel thread is missing.
        '''
        self.guest_ok('echo 0 > /proc/sys/kernel/panic')
        self.vm.console_socket.sendall(b'echo c > /proc/sysrq-trigger\n')

    def reboot(self):
        '''Reset the machine.'''
        self._console = b''
        self.vm.cmd('system_reset')
        self.wait_console(rb'Guest is ready')
        self.prepare_guest()

    def test_no_statistics(self):
        '''The guest does not answer when it is asked for statistics.'''
        self.launch(',guest-stats-polling-interval=1')
        self.wait_for_stats()
        self.wait_good()
        self.crash()
        self.wait_for(lambda: self.status()['statistics'].get('asked-ago', 0)
                      >= self.SLOW, 'statistics not to be sent')

        status = self.check_finds(
            'no statistics', 'the guest does not send statistics that it was'
            ' asked for: is its service running?')
        self.assertEqual(status['driver'], 'ready')
        self.assertEqual(status['statistics']['state'], 'asked')
        self.assertEqual(status['statistics']['polling-interval'], 1)
        self.assertEqual(status['statistics']['last-update'],
                         self.host_stats()[1])

        self.reboot()
        self.wait_for_stats()
        self.wait_good()

    def request_stats(self):
        '''Ask for statistics, and return the free memory.'''
        self.vm.cmd('qom-set', path=self.BALLOON,
                    property='guest-stats-request', value=True)
        event = self.vm.event_wait('BALLOON_STATS', timeout=30)
        self.assertTrue(event['data']['answered'])
        return self.host_stats()[0]['stat-free-memory']

    def test_statistics_at_once(self):
        '''Nobody polls statistics, and somebody wants to know now.'''
        self.launch()
        before = self.request_stats()
        self.guest_ok('mkdir -p /data && mount -t tmpfs data /data'
                      ' && dd if=/dev/zero of=/data/file bs=1M count=100')
        after = self.request_stats()
        self.assertLess(after, before - 90 * MIB)
        self.assertGreater(after, before - 130 * MIB)

    def test_pinned(self):
        '''A device is passed through to the guest.'''
        socket = os.path.join(self.socket_dir().name, 'vfio-user')
        NullDevice(socket).start()
        try:
            self.launch('', '-device', json.dumps({
                'driver': 'vfio-user-pci',
                'socket': {'type': 'unix', 'path': socket}}))
        except VMLaunchFailure as exc:
            if 'vfio-user-pci' in str(exc):
                self.skipTest('QEMU was built without vfio-user')
            raise
        # The guest sees the device that does nothing.
        self.assertIn('0x1b360005', self.guest_ok(
            'cat /proc/bus/pci/devices | while read slot id rest;'
            ' do echo "0x$id"; done'))
        self.assertEqual(self.use_memory(), 0)
        before = self.vm_status('VmRSS')
        self.set_balloon(self.TARGET)
        self.guest_sleep(self.QUIET)
        self.assertGreater(self.vm_status('VmRSS'), before - 16 * MIB)

        status = self.check_finds(
            'a device is passed through',
            'memory is not returned to the host, because it is pinned')
        self.assertEqual(status['inhibited-by'], ['pinned-memory'])
        self.assertEqual(status['actual'], self.TARGET)

    def launch_locked(self):
        '''Boot a guest with locked memory, if the host allows it.'''
        # root may lock memory in spite of the limit, unless in a container
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK,
                               (resource.RLIM_INFINITY,) * 2)
        except (ValueError, OSError) as exc:
            self.log.info('cannot raise the limit of locked memory: %s', exc)
        try:
            self.launch('', '-overcommit', 'mem-lock=on')
        except VMLaunchFailure as exc:
            if 'mlockall' in str(exc):
                self.skipTest('the host does not allow QEMU to lock memory')
            raise

    def test_locked(self):
        '''QEMU's memory is locked.'''
        self.launch_locked()
        before = self.vm_status('VmRSS')
        self.assertGreater(before, self.RAM)
        # The guest does what it should, but the host gets nothing.
        self.set_balloon(self.TARGET)
        self.guest_sleep(self.QUIET)
        self.assertGreater(self.vm_status('VmRSS'), before - 16 * MIB)

        status = self.check_finds(
            'locked memory', 'memory is not returned to the host, because it'
            ' is locked')
        self.assertEqual(status['driver'], 'ready')
        self.assertEqual(status['actual'], self.TARGET)
        self.assertEqual(status['target'], self.TARGET)


if __name__ == '__main__':
    BalloonLinuxTest.main()
