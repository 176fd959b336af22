#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# A Linux guest that deflates its balloon before it runs out of memory
'''Functional tests of virtio-balloon with a Linux guest'''

import os

from virtio_balloon_guest import BalloonGuestTest, MIB, UNSET_STATS_VALUE
from virtio_balloon_migration import BalloonLinuxTest, SYSFS
from virtio_balloon_policies import BalloonPolicyTest


class VirtioBalloonOom(BalloonGuestTest):
    '''Functional tests of virtio-balloon with a Linux guest'''

    def check_killed(self, result):
        '''The guest did not have the feature.'''
        self.assertEqual(result['bit 2'], '0')
        self.assertEqual(result['before'], self.TARGET)
        self.assertEqual(result['exit'], 137)
        self.assertTrue(result['killed'])
        self.assertEqual(result['after'], self.TARGET)

    def test_deflate_on_oom(self):
        '''With the feature, the process survives.'''
        self.launch(',deflate-on-oom=on')
        self.assertTrue(self.host_property('deflate-on-oom'))
        result = self.oom_scenario()
        self.assertEqual(result['bit 2'], '1')
        self.assertEqual(result['before'], self.TARGET)
        self.assertEqual(result['exit'], 0)
        self.assertEqual(result['killed'], [])
        self.assertGreater(result['after'], self.HOG)
        self.assertLess(result['after'], self.RAM)

        # What the user can see; the C implementation has no counters
        if os.getenv('BALLOON_DEVICE') != 'c':
            counters = self.host_property('balloon-counters')
            self.assertGreaterEqual(
                counters['pages-deflated-unasked'] * 4096,
                result['after'] - result['before'])

        # The target has not changed, and the balloon still works
        self.set_balloon(400 * MIB)
        self.set_balloon(self.TARGET)

    def test_no_deflate_on_oom(self):
        '''Without it, the process is killed.'''
        self.launch(',deflate-on-oom=off')
        self.assertFalse(self.host_property('deflate-on-oom'))
        self.check_killed(self.oom_scenario())

    def test_default(self):
        '''The feature is off by default.'''
        self.launch()
        self.assertFalse(self.host_property('deflate-on-oom'))
        self.check_killed(self.oom_scenario())

    def test_inflate_deflate(self):
        '''The balloon reaches each target, and says so.'''
        self.launch()
        for target in [300, 200, 512, 256, 512]:
            self.vm.get_qmp_events()
            self.set_balloon(target * MIB)
            changes = [event['data']['actual']
                       for event in self.vm.get_qmp_events()
                       if event['event'] == 'BALLOON_CHANGE']
            # events are limited to one per second
            for actual in changes:
                self.assertLessEqual(actual, self.RAM)
            _, out = self.run_in_guest('grep MemTotal /proc/meminfo')
            total = int(out.split()[1]) * 1024
            self.assertLess(total, target * MIB)
        # The last event may still be pending
        if changes[-1:] != [target * MIB]:
            event = self.vm.event_wait(
                'BALLOON_CHANGE', timeout=self.timeout,
                match={'data': {'actual': target * MIB}})
            self.assertIsNotNone(event)

    def test_stats(self):
        '''The driver sends statistics when the device requests them.'''
        self.launch()
        self.vm.cmd('qom-set', path=self.BALLOON,
                    property='guest-stats-polling-interval', value=1)
        stats = self.wait_for(
            lambda: (lambda s: s['last-update'] and s)
            (self.host_property('guest-stats')), 'statistics')

        _, out = self.run_in_guest('grep MemTotal /proc/meminfo')
        self.assertEqual(stats['stats']['stat-total-memory'],
                         int(out.split()[1]) * 1024)
        for name in ['stat-free-memory', 'stat-available-memory']:
            self.assertLess(stats['stats'][name], self.RAM)
        unset = [name for name, value in stats['stats'].items()
                 if value == UNSET_STATS_VALUE]
        self.assertNotIn('stat-major-faults', unset)

        # and continues to send them
        first = stats['last-update']
        self.wait_for(lambda: self.host_property('guest-stats')['last-update']
                      >= first + 2, 'more statistics')

    def qemu_memory(self, file, field):
        '''QEMU's memory according to the kernel, in bytes'''
        with open(f'/proc/{self.vm.get_pid()}/{file}',
                  encoding='ascii') as lines:
            for line in lines:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
        return 0

    def rss(self):
        '''Resident memory of QEMU in bytes'''
        return self.qemu_memory('smaps_rollup', 'Rss:')

    def peak(self):
        '''The largest resident memory that QEMU has had, in bytes'''
        return self.qemu_memory('status', 'VmHWM:')

    def test_inflate_gives_memory_back(self):
        '''
        Memory that the guest has used returns to the host when it is inflated.
        '''
        self.launch()
        self.assertEqual(self.use_memory(), 0)
        used = self.rss()
        self.assertGreater(used, self.HOG)
        self.set_balloon(self.TARGET)
        self.wait_for(lambda: self.rss() < used - 150 * MIB,
                      'QEMU to become smaller')

    def test_free_page_reporting(self):
        '''Memory that the guest does not use anymore is discarded.'''
        self.launch(',free-page-reporting=on')
        self.assertEqual(self.guest_features()[5], '1')
        self.assertEqual(self.use_memory(), 0)
        # Not the current memory: on a busy host, the guest may already have
        # reported pages.
        used = self.peak()
        self.assertGreater(used, self.HOG)
        self.wait_for(lambda: self.rss() < used - 150 * MIB,
                      'QEMU to become smaller')


class VirtioBalloonAlarms(BalloonLinuxTest):
    '''
    The counters for guests that run out of memory do not change in other
    cases.
    '''

    TARGET = 256 * MIB

    def check_quiet(self, expected=0):
        '''Nothing was counted.'''
        # The driver has a second to reset the device after it has emptied
        # the balloon.
        self.guest_sleep(2)
        counters = self.host_property('balloon-counters')
        self.assertEqual(counters['pages-deflated-unasked'], expected)
        self.assertEqual(counters['oom-holds'], 0)
        self.assertEqual(counters['oom-hold-active'], 0)

    def wait_target(self):
        '''The driver has inflated the balloon.'''
        self.wait_for(lambda: self.actual() == self.TARGET, 'inflation')

    def pages_moved(self):
        '''Pages of the balloon that the guest has moved'''
        out = self.guest_ok('grep ^balloon_migrate /proc/vmstat')
        return int(out.split()[1])

    def compact(self):
        '''Have the guest move pages of the balloon.'''
        before = self.pages_moved()
        self.guest_ok('mkdir -p /tmp/files;'
                      ' mount -t tmpfs -o size=256m none /tmp/files')

        def moved():
            # After a file is removed that was older than the balloon, free
            # pages are at high addresses.
            self.set_balloon(self.RAM)
            self.guest_ok('dd if=/dev/zero of=/tmp/files/a bs=1M count=160')
            self.set_balloon(self.TARGET)
            self.guest_ok('rm /tmp/files/a;'
                          ' for i in 1 2 3 4 5; do'
                          ' echo 1 > /proc/sys/vm/compact_memory; done')
            return self.pages_moved() - before

        pages = self.wait_for(moved, 'pages to be moved')
        self.log.info('%d pages were moved', pages)

    def unbind(self):
        '''Unbind the driver, and bind it again.'''
        name = os.path.basename(self.virtio_device())
        self.guest_ok(f'echo {name} > {SYSFS}/unbind')
        self.assertEqual(self.actual(), self.RAM)
        self.check_quiet()
        self.guest_ok(f'echo {name} > {SYSFS}/bind')

    def unload(self):
        '''Unload the driver, and load it again.'''
        self.guest_ok('rmmod virtio_balloon')
        self.assertEqual(self.actual(), self.RAM)
        self.check_quiet()
        self.guest_ok('insmod /modules/*-virtio_balloon.ko')

    def suspend(self):
        '''Suspend the guest to RAM, and wake it up.'''
        self.fall_asleep()
        self.vm.cmd('system_wakeup')
        self.wait_console(rb'is awake 0\r?\n')

    def reboot(self):
        '''Reset the machine.'''
        self._console = b''
        self.vm.cmd('system_reset')
        self.wait_console(rb'Guest is ready')
        self.prepare_guest()

    def resize(self):
        '''The host sets other sizes.'''
        for target in [384, 320, 448, 256]:
            self.set_balloon(target * MIB)

    def check_alarms(self, feature):
        '''Do everything that must not change the counters.'''
        if os.getenv('BALLOON_DEVICE') == 'c':
            self.skipTest('the implementation in C does not count')
        self.launch(f',deflate-on-oom={feature},oom-hold-time=60')
        self.set_balloon(self.TARGET)
        self.check_quiet()
        for event in [self.resize, self.compact, self.unbind, self.unload,
                      self.suspend, self.reboot]:
            with self.part(event.__name__):
                event()
                self.wait_target()
                self.check_quiet()
                # Here the host asks for a smaller balloon, so nothing counts
                # as unasked.
                self.set_balloon(self.TARGET + 64 * MIB)
                self.check_quiet()
                self.set_balloon(self.TARGET)

    def test_no_alarms(self):
        '''With the feature'''
        self.check_alarms('on')
        # Now the guest runs out of memory: each page that it deflates counts
        self.assertEqual(self.use_memory(), 0)
        self.wait_for(lambda: self.actual() > self.TARGET, 'deflation')
        self.guest_sleep(2)
        counters = self.host_property('balloon-counters')
        self.assertEqual(counters['pages-deflated-unasked'] * 4096,
                         self.actual() - self.TARGET)
        self.assertEqual(counters['oom-holds'], 1)

    def test_no_alarms_without_feature(self):
        '''Without the feature'''
        self.check_alarms('off')


class VirtioBalloonPolicies(BalloonPolicyTest):
    '''Drivers that deflate on OOM as different versions of Linux did'''

    def check_policy(self, policy):
        '''Without the feature, the process is killed; with it, it survives.'''
        result = self.out_of_memory(policy, 'off')
        self.assertEqual(result['exit'], 137)
        self.assertEqual(result['killed'], 1)
        self.assertEqual(result['pages'], 0)
        self.assertEqual(result['actual'], self.TARGET)
        self.vm.shutdown()
        # The next guest has other options.
        self._vms.clear()

        result = self.out_of_memory(policy, 'on')
        self.assertEqual(result['exit'], 0)
        self.assertEqual(result['killed'], 0)
        self.assertGreater(result['actual'], self.HOG)
        self.assertIn(result['unasked'], (None, result['pages']))
        return result

    def check_notifier(self, policy):
        '''The notifier takes out 256 pages each time that it is called.'''
        result = self.check_policy(policy)
        self.assertEqual(result['pages'], 256 * result['calls'])
        self.assertLess(result['actual'], self.RAM)

    def test_oom_notifier_2014(self):
        '''Linux 3.19 to 4.18'''
        self.check_notifier('oom-notifier-2014')

    def test_shrinker_2018(self):
        '''Linux 4.19 to 5.6: it takes out 128 pages, or fewer, at a time.'''
        result = self.check_policy('shrinker-2018')
        self.assertGreaterEqual(result['calls'], result['pages'] // 128)
        self.assertLessEqual(result['calls'], result['pages'] // 32)

    def test_oom_notifier_2020(self):
        '''Linux 5.7 and later'''
        self.check_notifier('oom-notifier-2020')


if __name__ == '__main__':
    BalloonGuestTest.main()
