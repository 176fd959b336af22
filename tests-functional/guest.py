#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Measure how long a Linux guest takes to inflate and deflate its balloon
'''Inflate and deflate 2 GiB in a guest; print the results as JSON.'''

import io
import json
import os
import sys
import time
import unittest

from virtio_balloon_guest import BalloonGuestTest, MIB

RESULTS = {}
TICK = os.sysconf('SC_CLK_TCK')


class Bench(BalloonGuestTest):
    '''One guest'''

    RAM = 3072 * MIB
    TARGET = 1024 * MIB
    HOG = 2200 * MIB

    def cpu_time(self):
        '''CPU time of QEMU in seconds: of the guest's code, and the kernel'''
        with open(f'/proc/{self.vm.get_pid()}/stat', encoding='ascii') as f:
            fields = f.read().rpartition(')')[2].split()
        return int(fields[11]) / TICK, int(fields[12]) / TICK

    def resident(self, name):
        '''A field of smaps_rollup in MiB'''
        with open(f'/proc/{self.vm.get_pid()}/smaps_rollup',
                  encoding='ascii') as f:
            for line in f:
                if line.startswith(name + ':'):
                    return int(line.split()[1]) // 1024
        return None

    def timed(self, name, value):
        '''Change the size of the balloon'''
        start, (user, system) = time.monotonic(), self.cpu_time()
        self.vm.cmd('balloon', value=value)
        while self.actual() != value:
            self.assertLess(time.monotonic(), start + self.timeout)
            time.sleep(0.01)
        stop, (user2, system2) = time.monotonic(), self.cpu_time()
        RESULTS[name] = {'seconds': round(stop - start, 2),
                         'user cpu': round(user2 - user, 2),
                         'system cpu': round(system2 - system, 2)}

    def test(self):
        '''Measure'''
        self.launch()
        RESULTS['kernel'] = self.guest_kernel()
        self.assertEqual(self.use_memory(), 0)
        RESULTS['used'] = {name: self.resident(name)
                           for name in ('Rss', 'AnonHugePages')}
        self.timed('inflate', self.TARGET)
        RESULTS['inflated'] = {name: self.resident(name)
                               for name in ('Rss', 'AnonHugePages')}
        self.timed('deflate', self.RAM)


def main():
    '''Run the test, whose own output does not matter unless it fails.'''
    output = io.StringIO()
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(Bench)
    result = unittest.TextTestRunner(stream=output).run(suite)
    if not result.wasSuccessful() or result.skipped:
        print(output.getvalue(), result.skipped, file=sys.stderr)
        sys.exit(1)
    print(json.dumps(RESULTS))


main()
