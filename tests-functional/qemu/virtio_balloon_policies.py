# SPDX-License-Identifier: GPL-2.0-or-later
#
# Linux guests with balloon drivers that deflate by themselves in different
# situations
'''Base class for tests of what deflate-on-oom has meant to Linux'''

import os
import re

from virtio_balloon_guest import BalloonGuestTest, MIB

# The policies, and the function of the driver that the kernel calls when it
# needs memory
POLICIES = {
    'oom-notifier-2014': 'virtio_balloon_oom_notify',
    'shrinker-2018': 'virtio_balloon_shrinker_scan',
    'oom-notifier-2020': 'virtio_balloon_oom_notify',
}

TRACING = '/sys/kernel/tracing'


class BalloonPolicyTest(BalloonGuestTest):
    '''
    Boots guests with one of several balloon drivers.

    BALLOON_GUEST_POLICIES is a directory with an initramfs for each of them,
    which also has a program that uses memory: "memory touch MIB" writes to
    each page of so much.
    '''

    def setUp(self):
        super().setUp()
        self.initrds = os.getenv('BALLOON_GUEST_POLICIES')
        if not self.initrds:
            self.skipTest('no drivers: use "cargo xtask test functional"')

    def boot(self, policy, bit, options='', *args):
        '''Boot a guest with a policy, and with or without the feature.'''
        self.initrd = os.path.join(self.initrds, policy + '.gz')
        self.launch(f',deflate-on-oom={bit}' + options, *args)
        self.assertEqual(self.guest_features()[2], '1' if bit == 'on' else '0')
        # Count the calls into the driver with kprobes, which need no support
        # in the driver
        status, out = self.run_in_guest(
            f'mount -t tracefs tracefs {TRACING};'
            f' echo "p:balloon virtio_balloon:{POLICIES[policy]}"'
            f' > {TRACING}/kprobe_events'
            f' && echo 1 > {TRACING}/events/kprobes/balloon/enable')
        self.assertEqual(status, 0, out)

    def calls(self):
        '''How often the kernel has called the driver for memory'''
        _, out = self.run_in_guest(f'cat {TRACING}/kprobe_profile')
        name, hits, misses = out.split()
        self.assertEqual((name, misses), ('balloon', '0'))
        return int(hits)

    def vmstat(self):
        '''/proc/vmstat'''
        _, out = self.run_in_guest('cat /proc/vmstat')
        return {key: int(value) for key, value in
                re.findall(r'^(\w+) (\d+)$', out, re.MULTILINE)}

    def counters(self):
        '''The counters of the device; empty with the C implementation'''
        if os.getenv('BALLOON_DEVICE') == 'c':
            return {}
        return self.host_property('balloon-counters')

    def check_counts(self):
        '''
        While the guest does not change the balloon, compare what the guest and
        the device have counted, and return both.  When the guest moves a page
        of the balloon, another page goes into the balloon instead.
        '''
        vmstat, counters = self.vmstat(), self.counters()
        migrated = vmstat.get('balloon_migrate', 0)
        inflated = vmstat['balloon_inflate'] + migrated
        deflated = vmstat['balloon_deflate'] + migrated
        self.assertEqual((inflated - deflated) * 4096,
                         self.RAM - self.actual())
        if counters:
            self.assertEqual(counters['pages-inflated'], inflated)
            self.assertEqual(counters['pages-deflated'], deflated)
        return vmstat, counters

    def touch(self, size):
        '''
        Have a process write to each page of the given amount of memory.
        Return its exit code and, if it has survived, how many seconds that
        took, and how long the slowest write took.
        '''
        status, out = self.run_in_guest(f'memory touch {size // MIB}')
        match = re.search(r'in (\d+) us, longest (\d+) us', out)
        if not match:
            return status, None, None
        return status, *(int(us) / 1e6 for us in match.groups())

    def out_of_memory(self, policy, bit):
        '''
        Inflate the balloon, then have a process use more memory than is left.
        Return what happened.
        '''
        self.boot(policy, bit)
        status, free_time, free_longest = self.touch(self.HOG)
        self.assertEqual(status, 0)
        self.set_balloon(self.TARGET)
        self.guest_sleep(1)
        before, _ = self.check_counts()
        calls = self.calls()
        status, time, longest = self.touch(self.HOG)
        # The driver may update the size of the balloon a moment later
        self.guest_sleep(1)
        after, counters = self.check_counts()
        result = {
            'policy': policy,
            'bit': bit,
            'exit': status,
            'killed': after['oom_kill'] - before['oom_kill'],
            'pages': after['balloon_deflate'] - before['balloon_deflate'],
            'calls': self.calls() - calls,
            'seconds': time,
            'longest': longest,
            'seconds without balloon': free_time,
            'longest without balloon': free_longest,
            'actual': self.actual(),
            'unasked': counters.get('pages-deflated-unasked'),
        }
        self.log.info('%s', result)
        return result
