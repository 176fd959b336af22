#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# What a Linux guest and its host can do with a memory balloon
'''Functional tests of virtio-balloon with a Linux guest'''

import os
import re
import time

from virtio_balloon_guest import MIB
from virtio_balloon_migration import (
    BalloonLinuxTest, CMDLINE, F_FREE_PAGE_HINT, F_REPORTING, POISON_CMDLINE,
    SYSFS)

POISON = ('-append', f'{CMDLINE} {POISON_CMDLINE}')

# Statistics that all kernels send
BASIC = ['stat-swap-in', 'stat-swap-out', 'stat-major-faults',
         'stat-minor-faults', 'stat-free-memory', 'stat-total-memory',
         'stat-available-memory', 'stat-disk-caches', 'stat-htlb-pgalloc',
         'stat-htlb-pgfail']

# Statistics that Linux sends since 6.12
RECLAIM = ['stat-oom-kills', 'stat-alloc-stalls', 'stat-async-scans',
           'stat-direct-scans', 'stat-async-reclaims', 'stat-direct-reclaims']


class VirtioBalloonReporting(BalloonLinuxTest):
    '''Memory that the guest does not use anymore returns to the host.'''

    # 60% of the memory
    HOG = 307 * MIB

    # The driver reports with a delay of 2 s
    DELAY = 2

    def idle(self):
        '''Wait until QEMU neither grows nor shrinks; return its RSS.'''
        last = []

        def settled():
            self.guest_sleep(self.DELAY)
            last.append(self.vm_status('VmRSS'))
            recent = last[-4:]
            return (len(recent) == 4
                    and max(recent) - min(recent) < 2 * MIB)

        self.wait_for(settled, 'QEMU to settle')
        return last[-1]

    def reset_peak(self):
        '''Reset the peak of QEMU's memory.'''
        with open(f'/proc/{self.vm.get_pid()}/clear_refs', 'w',
                  encoding='ascii') as clear:
            clear.write('5')

    def use_and_free(self):
        '''Use memory in the guest; return the peak of QEMU's memory.'''
        self.reset_peak()
        self.assertEqual(self.use_memory(), 0)
        return self.vm_status('VmHWM')

    def test_reporting(self):
        '''QEMU's memory shrinks to its previous size.'''
        self.launch(',free-page-reporting=on')
        self.require_feature(F_REPORTING, 'free page reporting')
        before = self.idle()
        for _ in range(2):
            # The driver may report memory before the process ends, and some of
            # the memory was already in use.
            peak = self.use_and_free()
            self.log.info('idle %d, peak %d', before, peak)
            self.assertGreater(peak, before + self.HOG // 2)
            start = time.monotonic()
            self.wait_for(lambda: self.vm_status('VmRSS') < before * 1.1,
                          f'QEMU to shrink from {peak} to {before}')
            self.log.info('RSS is back after %.1f s', time.monotonic() - start)

    def test_no_reporting(self):
        '''Without the feature, QEMU's memory does not shrink.'''
        self.launch(',free-page-reporting=off')
        before = self.idle()
        peak = self.use_and_free()
        self.assertGreater(peak, before + self.HOG // 2)
        # This is long enough for several reports
        self.guest_sleep(4 * self.DELAY)
        self.assertGreater(self.vm_status('VmRSS'), peak - 16 * MIB)

    def test_poison(self):
        '''Free pages that are not zero have to keep their contents.'''
        self.launch(',free-page-reporting=on,page-poison=on', *POISON)
        self.require_feature(F_REPORTING, 'free page reporting')
        self.guest_poison()
        # Wait for pending reports.  With init_on_free, the guest has already
        # written to all of its memory.
        self.idle()
        peak = self.use_and_free()
        self.assertGreater(peak, self.HOG)
        # This would be enough for several reports
        self.guest_sleep(6 * self.DELAY)
        self.assertGreater(self.vm_status('VmRSS'), peak - 16 * MIB)

        # Pages that are zero can be discarded.  (They are zero, unless a
        # kernel with CONFIG_PAGE_POISONING has filled them.)
        if 'page_poison=1' in self.guest_ok(
                'dmesg | grep "Unknown kernel command line"; true'):
            self.write_poison(0)
            self.use_and_free()
            self.wait_for(lambda: self.vm_status('VmRSS')
                          < peak - self.HOG // 2, 'QEMU to shrink')


class VirtioBalloonStats(BalloonLinuxTest):
    '''Statistics that the driver sends'''

    POLLING = 'guest-stats-polling-interval'

    def last_update(self):
        '''When the driver has sent statistics'''
        return self.host_stats()[1]

    def has_buffer(self):
        '''
        Whether the device has the buffer for statistics, so that the driver
        cannot send any
        '''
        return self.vm.cmd('x-query-virtio-queue-status',
                           path=self.BALLOON + '/virtio-backend',
                           queue=2)['inuse'] == 1

    def check_no_updates(self):
        '''No more statistics arrive.'''
        if self.guest_features():
            # The device may already have requested statistics
            self.wait_for(self.has_buffer, 'the driver to answer')
        before = self.last_update()
        self.guest_sleep(5)
        self.assertEqual(self.last_update(), before)

    def vmstat(self):
        '''/proc/vmstat'''
        return {key: int(value) for key, value in
                re.findall(r'^(\S+) (\d+)$',
                           self.guest_ok('cat /proc/vmstat'), re.MULTILINE)}

    def counters(self):
        '''The statistics that are also in /proc/vmstat of the guest'''
        vmstat = self.vmstat()
        return {
            'stat-swap-in': vmstat['pswpin'] * 4096,
            'stat-swap-out': vmstat['pswpout'] * 4096,
            'stat-major-faults': vmstat['pgmajfault'],
            # the driver sends the number of all faults
            'stat-minor-faults': vmstat['pgfault'],
            'stat-htlb-pgalloc': vmstat.get('htlb_buddy_alloc_success', 0),
            'stat-htlb-pgfail': vmstat.get('htlb_buddy_alloc_fail', 0),
            'stat-oom-kills': vmstat['oom_kill'],
            'stat-alloc-stalls': sum(
                value for key, value in vmstat.items()
                if key.startswith('allocstall_')),
            'stat-async-scans': vmstat['pgscan_kswapd'],
            'stat-direct-scans': vmstat['pgscan_direct'],
            'stat-async-reclaims': vmstat['pgsteal_kswapd'],
            'stat-direct-reclaims': vmstat['pgsteal_direct'],
        }

    def check_plausible(self):
        '''The statistics agree with what the guest shows.'''
        before = self.counters()
        self.wait_for_stats(3)
        stats, _ = self.host_stats()
        after = self.counters()
        for name, value in before.items():
            if name in stats:
                self.assertLessEqual(value, stats[name], name)
                self.assertLessEqual(stats[name], after[name], name)
        self.assertEqual(stats['stat-total-memory'],
                         self.meminfo()['MemTotal'])
        # These values increase and decrease.  Wait until both agree.
        for name, key in [('stat-free-memory', 'MemFree'),
                          ('stat-available-memory', 'MemAvailable'),
                          ('stat-disk-caches', 'Cached')]:
            self.wait_for(lambda name=name, key=key:
                          abs(self.host_stats()[0][name] - self.meminfo()[key])
                          < 16 * MIB, f'{name} to be what {key} is')

    def check_tags(self):
        '''The driver sends all statistics that its kernel has.'''
        release = tuple(map(int, re.findall(r'\d+', self.guest_kernel())[:2]))
        expected = BASIC + (RECLAIM if release >= (6, 12) else [])
        stats, _ = self.host_stats()
        self.assertEqual([tag for tag in expected if tag not in stats], [])
        self.log.info('Linux %s: %d tags', release, len(stats))

    def test_probe(self):
        '''The driver sends statistics without being asked first.'''
        self.launch()
        self.wait_for(self.last_update, 'statistics')
        self.check_tags()
        self.assertEqual(self.host_property(self.POLLING), 0)
        self.check_no_updates()

    def test_polling(self):
        '''The interval is set, changed, and disabled.'''
        self.launch()
        self.set_polling(1)
        self.assertEqual(self.host_property(self.POLLING), 1)
        self.wait_for_stats(4)
        self.check_tags()
        self.check_plausible()

        self.set_polling(3600)
        self.assertEqual(self.host_property(self.POLLING), 3600)
        self.check_no_updates()
        self.set_polling(2)
        self.wait_for_stats(2)
        self.set_polling(0)
        self.assertEqual(self.host_property(self.POLLING), 0)
        self.check_no_updates()
        # the last statistics remain
        self.assertNotEqual(self.last_update(), 0)
        self.check_tags()
        self.set_polling(1)
        # The values change if the guest is active
        self.assertEqual(self.use_memory(), 0)
        self.wait_for_stats(2)
        self.check_plausible()

    def test_errors(self):
        '''Invalid intervals'''
        self.launch()
        self.set_polling(7)
        no_integer = (f"Invalid parameter type for '{self.POLLING}',"
                      ' expected: integer')
        for value, expected in [
                (-1, 'timer value must be greater than zero'),
                (-1 << 63, 'timer value must be greater than zero'),
                (1 << 32, 'timer value is too big'),
                ((1 << 63) - 1, 'timer value is too big'),
                (1 << 63, no_integer),
                ('1', no_integer),
                ('abc', no_integer),
                (None, no_integer),
                (True, no_integer),
                (1.5, no_integer)]:
            reply = self.vm.qmp('qom-set', path=self.BALLOON,
                                property=self.POLLING, value=value)
            self.assertIn('error', reply, value)
            self.assertEqual(reply['error'],
                             {'class': 'GenericError', 'desc': expected})
            self.assertEqual(self.host_property(self.POLLING), 7)
        # The largest interval
        self.set_polling((1 << 32) - 1)
        self.assertEqual(self.host_property(self.POLLING), (1 << 32) - 1)
        reply = self.vm.qmp('qom-set', path=self.BALLOON,
                            property='guest-stats', value={})
        self.assertIn('error', reply)

    def test_rebind(self):
        '''The driver is unbound and bound again.'''
        self.launch()
        self.set_polling(1)
        self.set_balloon(self.TARGET)
        self.wait_for_stats()
        for _ in range(3):
            name = os.path.basename(self.virtio_device())
            self.guest_ok(f'echo {name} > {SYSFS}/unbind')
            # The driver empties the balloon
            self.assertEqual(self.actual(), self.RAM)
            self.assertIsNone(self.guest_features())
            self.check_no_updates()
            # the last statistics remain
            self.check_tags()
            self.guest_ok(f'echo {name} > {SYSFS}/bind')
            self.wait_for(lambda: self.actual() == self.TARGET, 'inflation')
            self.wait_for_stats()
            self.check_plausible()
        self.set_balloon(self.RAM)
        self.set_balloon(self.TARGET)

    def check_reset(self, interval):
        '''Reset the machine.'''
        self.set_polling(interval)
        self.set_balloon(self.TARGET)
        self.wait_for(self.last_update, 'statistics')
        # Read the statistics before the driver sends more
        self.vm.cmd('stop')
        self.vm.get_qmp_events()
        self.vm.cmd('system_reset')
        self.assertIsNotNone(self.vm.event_wait('RESET', timeout=self.timeout))
        self.assertEqual(self.host_stats(), ({}, 0))
        self.assertEqual(self.host_property(self.POLLING), interval)
        self._console = b''
        self.vm.cmd('cont')
        self.wait_console(rb'Guest is ready')
        self.prepare_guest()
        self.wait_for(self.last_update, 'statistics')
        self.check_tags()
        # The target is still the same
        self.wait_for(lambda: self.meminfo()['MemTotal'] < self.TARGET,
                      'the driver to inflate the balloon')
        self.wait_for(lambda: self.actual() == self.TARGET, 'inflation')

    def test_reset(self):
        '''There are no statistics after a reset, until the driver is back.'''
        self.launch()
        self.check_reset(0)
        self.check_no_updates()
        self.check_reset(1)
        self.wait_for_stats()
        self.check_plausible()
        self.set_balloon(self.RAM)

    def sleep_and_wake(self, stats):
        '''Suspend the guest to RAM, and wake it up.'''
        self.fall_asleep()
        asleep = self.host_stats()
        self.assertEqual(set(asleep[0]), stats)
        self.assertNotEqual(asleep[1], 0)

        self.vm.cmd('system_wakeup')
        # At first, the statistics are the same; the driver will soon send new
        # ones
        for _ in range(50):
            awake = self.host_stats()
            self.assertEqual(set(awake[0]), stats)
            self.assertGreaterEqual(awake[1], asleep[1])
        self.wait_console(rb'is awake 0\r?\n')

    def test_suspend(self):
        '''Statistics survive when the guest sleeps.'''
        self.launch()
        _, out = self.run_in_guest('cat /sys/power/state /sys/power/mem_sleep')
        if 'mem' not in out or '[deep]' not in out:
            self.skipTest(f'no suspend to RAM in the guest: {out}')
        info = self.vm.cmd('query-current-machine')
        if not info['wakeup-suspend-support']:
            self.skipTest('no suspend to RAM in QEMU')
        self.set_balloon(self.TARGET)
        self.wait_for(self.last_update, 'statistics')
        stats = set(self.host_stats()[0])
        self.sleep_and_wake(stats)
        self.wait_for(lambda: self.actual() == self.TARGET, 'inflation')
        self.check_no_updates()
        self.set_polling(1)
        self.wait_for_stats()
        # while there is a timer
        self.sleep_and_wake(stats)
        self.wait_for_stats()
        self.check_plausible()
        self.set_balloon(self.RAM)
        self.set_balloon(self.TARGET)


class VirtioBalloonHotplug(BalloonLinuxTest):
    '''The balloon is plugged and unplugged.'''

    COUNT = 30 if os.getenv('BALLOON_QUICK') == '1' else 100

    # The number of cycles until caches and free lists have reached their size
    WARM_UP = 10

    # Limit for the growth of QEMU's own memory, over all cycles
    GROWTH = 8 * MIB

    def tree(self):
        '''The QOM objects in all places where the device adds some'''
        # Leave out the numbers of memory regions, which differ
        return {path: sorted((re.sub(r'\[\d+\]', '[*]', item['name']),
                              item['type'])
                             for item in self.vm.cmd('qom-list', path=path))
                for path in ['/machine', '/machine/peripheral',
                             '/machine/peripheral-anon', '/objects',
                             '/machine/unattached', '/machine/i440fx/pci.0']}

    def add(self, options):
        '''Plug the device, and wait for the driver.'''
        self.vm.cmd('device_add', driver='virtio-balloon-pci', id='balloon0',
                    bus='pci.0', addr='0x8', **options)
        self.wait_for(lambda: self.guest_features() is not None,
                      'the balloon driver')

    def remove(self):
        '''Unplug the device, and wait for the guest to give it up.'''
        self.vm.cmd('device_del', id='balloon0')
        event = self.vm.event_wait('DEVICE_DELETED', timeout=self.timeout,
                                   match={'data': {'device': 'balloon0'}})
        self.assertIsNotNone(event)
        self.assertIsNone(self.guest_features())
        self.assertEqual(self.vm.cmd('qom-list', path='/machine/peripheral'),
                         [{'name': 'type', 'type': 'string'}])

    def check_second(self):
        '''There cannot be a second balloon.'''
        before = self.tree()
        reply = self.vm.qmp('device_add', driver='virtio-balloon-pci',
                            id='balloon1')
        self.assertEqual(reply.get('error'),
                         {'class': 'GenericError', 'desc':
                          'Only one balloon device is supported'})
        reply = self.vm.qmp('device_add', driver='virtio-balloon-pci',
                            id='balloon1', **{'free-page-hint': True})
        self.assertEqual(reply['error']['desc'],
                         'Only one balloon device is supported')
        self.assertEqual(self.tree(), before)

    def check_hotplug(self, options):
        '''Plug and unplug the balloon many times.'''
        # With a memfd, the memory of the guest does not count as anonymous.
        self.launch(',addr=0x8', '-accel', 'tcg,tb-size=32',
                    '-object', f'memory-backend-memfd,id=ram,size={self.RAM}',
                    '-machine', 'memory-backend=ram',
                    '-object', 'iothread,id=iothread0')
        self.check_second()
        self.remove()
        reply = self.vm.qmp('query-balloon')
        self.assertEqual(reply['error']['class'], 'DeviceNotActive')

        before = self.tree()
        plugged = None
        sizes = []
        for number in range(self.COUNT):
            self.add(options)
            if plugged is None:
                plugged = self.tree()
            self.assertEqual(self.tree(), plugged)
            self.assertEqual(self.actual(), self.RAM)
            if number % 2 == 0:
                # Unplug the device both with and without a timer
                self.set_polling(1)
            if number % 10 == 0:
                self.wait_for_stats(2)
                self.check_second()
            self.set_balloon(self.RAM - (16 + number % 16) * MIB)
            if number % 2 == 0:
                # Otherwise, the driver empties the balloon
                self.set_balloon(self.RAM)
            self.remove()
            self.assertEqual(self.tree(), before)
            sizes.append(self.vm_status('RssAnon'))
        self.log.info('RssAnon: %s', [size // 1024 for size in sizes])
        if os.getenv('BALLOON_VERBOSE'):
            print([size // 1024 for size in sizes][::5])
        # A leak would increase all of the last sizes, which noise does not.
        self.assertLess(min(sizes[-5:]) - max(sizes[self.WARM_UP - 5:
                                                    self.WARM_UP + 1]),
                        self.GROWTH)
        self.add(options)
        self.set_balloon(self.TARGET)
        self.set_balloon(self.RAM)

    def test_hotplug_fails(self):
        '''A device that could not be plugged leaves nothing behind.'''
        if os.getenv('BALLOON_DEVICE') == 'c':
            # If realize() fails, it does not remove the balloon handler
            self.skipTest('QEMU\'s implementation in C stays registered')
        self.launch(',addr=0x8')
        self.remove()
        before = self.tree()
        for _ in range(3):
            reply = self.vm.qmp('device_add', driver='virtio-balloon-pci',
                                id='balloon0', **{'free-page-hint': True})
            self.assertEqual(reply['error']['desc'],
                             "'free-page-hint' requires 'iothread' to be set")
            self.assertEqual(self.tree(), before)
            reply = self.vm.qmp('query-balloon')
            self.assertEqual(reply['error']['class'], 'DeviceNotActive')
        self.add({})
        self.set_balloon(self.TARGET)
        self.set_balloon(self.RAM)

    def test_hotplug(self):
        '''The balloon with its default properties'''
        self.check_hotplug({})

    def test_hotplug_features(self):
        '''The balloon with all optional features'''
        self.check_hotplug({'free-page-hint': True, 'iothread': 'iothread0',
                            'free-page-reporting': True,
                            'deflate-on-oom': True})
        self.require_feature(F_FREE_PAGE_HINT, 'free page hinting')


class VirtioBalloonReplay(BalloonLinuxTest):
    '''A recorded execution can be replayed.'''

    # Memory returns to the host in several turns.  The test does not type
    # commands, because the console of the tests is not recorded.
    SCRIPT = ('dd if=/dev/zero of=/dev/null bs=200M count=1 2>/dev/null;'
              ' sleep 6; echo Script is over; dmesg | tail -n 1; poweroff -f')

    def run_recorded(self, mode):
        '''Record or replay; return the console and the counters.'''
        vm = self.get_vm(name=mode)
        vm.set_machine('pc')
        vm.set_console()
        log = os.path.join(self.workdir, 'replay.bin')
        vm.add_args('-icount', f'shift=7,rr={mode},rrfile={log}',
                    '-m', str(self.RAM // MIB),
                    '-kernel', self.kernel, '-initrd', self.initrd,
                    '-append', f'{CMDLINE} RUN="{self.SCRIPT}"',
                    '-device', 'virtio-balloon-pci,id=balloon0'
                    ',free-page-reporting=on',
                    '-net', 'none', '-no-shutdown')
        vm.launch()
        console = b''
        while b'Power down\r\n' not in console:
            vm.console_socket.settimeout(self.timeout)
            data = vm.console_socket.recv(4096)
            self.assertTrue(data, f'QEMU has closed the console: {console}')
            console += data
        counters = None
        if os.getenv('BALLOON_DEVICE') != 'c':
            self.assertIsNotNone(
                vm.event_wait('STOP', timeout=self.timeout))
            counters = vm.cmd('qom-get', path=self.BALLOON,
                              property='balloon-counters')
        vm.shutdown()
        return console, counters

    def test_replay(self):
        '''The replay is the same for the guest and for the host.'''
        self.require_accelerator('tcg')
        recorded, counters = self.run_recorded('record')
        self.assertIn(b'Script is over', recorded)
        if counters:
            # more than the budget of one turn
            self.assertGreater(counters['bytes-discarded'], 100 * MIB)
            self.assertGreater(counters['discard-calls'], 6)
        self.assertEqual(self.run_recorded('replay'), (recorded, counters))


if __name__ == '__main__':
    BalloonLinuxTest.main()
