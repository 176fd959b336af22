#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Measure how the deflate-on-oom policies of different Linux versions affect a
# guest
'''Measure guests with each of the balloon drivers; write the results as JSON.'''

import argparse
import io
import json
import os
import sys
import tempfile
import time
import unittest

from virtio_balloon_guest import MIB
from virtio_balloon_policies import BalloonPolicyTest, POLICIES

SCENARIOS = ['oom', 'page_cache', 'loop']

# The reported test was done with 64 GB, a file of 42 GB and a balloon of 53 GB.
RAM = 2048 * MIB
FILE = RAM * 42 // 64
TARGET = RAM - RAM * 53 // 64 // MIB * MIB

# Number of processes that read the disk
READERS = 2

# MiB that the process in the loop allocates and frees twice a second
CHURN = 8

TICK = os.sysconf('SC_CLK_TCK')
START = time.monotonic()

# Interval between two samples of the balloon, in seconds
INTERVAL = 0.1

# A larger balloon counts as progress if it has grown by this much
PROGRESS = MIB

# The counters of /proc/vmstat that help to explain the results
REASONS = ['pgscan_kswapd', 'pgscan_direct', 'pgsteal_kswapd',
           'pgsteal_direct', 'slabs_scanned', 'oom_kill']


def say(what):
    '''Print progress for the user.'''
    print(f'[{time.monotonic() - START:4.0f} s] {what}',
          file=sys.stderr, flush=True)


def longest_stall(samples):
    '''
    The longest time for which the balloon was not larger than it had been
    before.  The samples begin with the time and the size of the guest.
    '''
    when, smallest = samples[0][:2]
    stall = 0
    for now, actual, *_ in samples:
        if actual <= smallest - PROGRESS:
            stall = max(stall, now - when)
            when, smallest = now, actual
    return max(stall, samples[-1][0] - when)


class Run(BalloonPolicyTest):
    '''One guest'''

    timeout = 120.0

    def __init__(self, scenario, policy, bit, prop, disk, quick):
        super().__init__('measure')
        self.scenario = scenario
        self.policy = policy
        self.bit = bit
        self.prop = prop
        self.disk = disk
        self.quick = quick
        self.result = None

    def measure(self):
        '''Boot a guest, and measure'''
        self.result = getattr(self, self.scenario)()
        self.result.update(scenario=self.scenario, policy=self.policy,
                           bit=self.bit, property=self.prop)

    def oom(self):
        '''A process uses more memory than the guest has.'''
        return self.out_of_memory(self.policy, self.bit)

    def sample(self, start):
        '''The time, the size of the guest, pages inflated and deflated'''
        actual, counters = self.actual(), self.counters()
        return (round(time.monotonic() - start, 3), actual,
                counters['pages-inflated'], counters['pages-deflated'])

    def watch(self, samples, start, target, limit):
        '''
        Look at the balloon until it reaches the target, or for limit seconds.
        Return when it did.
        '''
        until = time.monotonic() + limit
        while True:
            samples.append(self.sample(start))
            if samples[-1][1] == target:
                return samples[-1][0]
            if time.monotonic() > until:
                return None
            time.sleep(INTERVAL)

    def start_in_guest(self, commands):
        '''
        Have a shell run commands in the background, in a session of its own.
        The shell must not exit: the shell on the console is the init process
        and would get a signal, which it would mistake for the end of its
        input.
        '''
        self.run_in_guest(
            f"(setsid sh -c '{commands}; sleep 1000000'"
            ' < /dev/null > /dev/null 2>&1 &)')

    def stop_readers(self):
        '''End the processes that read the disk.'''
        self.run_in_guest('touch /stop; killall cat dd')

    def bytes_read(self):
        '''What the guest has read from its disk'''
        return sum(disk['stats']['rd_bytes']
                   for disk in self.vm.cmd('query-blockstats'))

    def page_cache(self):
        '''
        The balloon grows while processes fill the page cache, as in the report
        because of which Linux uses the OOM notifier again.
        '''
        self.RAM = RAM
        self.boot(self.policy, self.bit, '', '-smp', '2',
                  '-drive', f'file={self.disk},format=raw,if=none,id=disk,'
                  'readonly=on',
                  '-device', 'virtio-blk-pci,drive=disk')
        self.run_in_guest('cat /dev/vda > /dev/null')
        # At different positions, so that at each moment some process reads
        for i in range(READERS):
            skip = FILE // MIB * i // READERS
            self.start_in_guest(
                f'dd if=/dev/vda bs=1M skip={skip};'
                ' while [ ! -e /stop ] && cat /dev/vda; do :; done')
        before, calls = self.vmstat(), self.calls()
        read = self.bytes_read()
        samples, start = [], time.monotonic()
        self.vm.cmd('balloon', value=TARGET)
        reached = self.watch(samples, start, TARGET, 20 if self.quick else 40)
        read = self.bytes_read() - read
        stopped = None
        if reached is None:
            self.stop_readers()
            stopped = time.monotonic() - start
            self.watch(samples, start, TARGET, self.timeout)
        after, calls = self.vmstat(), self.calls() - calls
        if reached is not None:
            self.stop_readers()
        self.set_balloon(self.RAM)
        self.guest_sleep(1)
        vmstat, counters = self.check_counts()
        return {
            'seconds': reached,
            'reader stopped after': stopped,
            'seconds in all': samples[-1][0],
            'longest stall': longest_stall(samples),
            'read': read,
            'calls': calls,
            'balloon_inflate': vmstat['balloon_inflate'],
            'balloon_deflate': vmstat['balloon_deflate'],
            'balloon_migrate': vmstat.get('balloon_migrate', 0),
            'counters': counters,
            'vmstat': {key: after[key] - before[key] for key in REASONS},
            'samples': samples,
        }

    def host_time(self):
        '''CPU time of QEMU, and of the thread of the vCPU, in seconds'''
        with open(f'/proc/{self.vm.get_pid()}/stat', encoding='ascii') as f:
            fields = f.read().rpartition(')')[2].split()
        vcpu = 0
        for cpu in self.vm.cmd('query-cpus-fast'):
            path = f'/proc/{self.vm.get_pid()}/task/{cpu["thread-id"]}/stat'
            with open(path, encoding='ascii') as f:
                times = f.read().rpartition(')')[2].split()
            vcpu += int(times[11]) + int(times[12])
        return (int(fields[11]) + int(fields[12])) / TICK, vcpu / TICK

    def guest_time(self):
        '''CPU time of the guest: in total, and without idle time'''
        _, out = self.run_in_guest('head -n 1 /proc/stat')
        times = [int(ticks) / 100 for ticks in out.split()[1:9]]
        return sum(times), sum(times) - times[3] - times[4]

    def loop(self):
        '''A process keeps memory that the host wants in the balloon.'''
        self.boot(self.policy, self.bit, self.prop and ',' + self.prop)
        self.start_in_guest(
            f'memory hold {self.HOG // MIB} {CHURN} > /held')
        self.wait_for(lambda: 'holding' in self.run_in_guest('cat /held')[1],
                      'the process')
        killed = self.vmstat()['oom_kill']
        self.vm.cmd('balloon', value=self.TARGET)
        # until the guest has no memory left to give
        self.guest_sleep(5)
        before, calls = self.vmstat(), self.calls()
        all_before, busy_before = self.guest_time()
        host_before, vcpu_before = self.host_time()
        samples, start = [], time.monotonic()
        self.vm.get_qmp_events()
        self.watch(samples, start, 0, 5 if self.quick else 15)
        events = sum(event['event'] == 'BALLOON_CHANGE'
                     for event in self.vm.get_qmp_events())
        host, vcpu = self.host_time()
        took = time.monotonic() - start
        all_after, busy_after = self.guest_time()
        after, calls = self.vmstat(), self.calls() - calls
        return {
            'killed': after['oom_kill'] - killed,
            'guest cpu': (busy_after - busy_before) / (all_after - all_before),
            'qemu cpu': (host - host_before) / took,
            'device cpu': (host - host_before - vcpu + vcpu_before) / took,
            'inflated per second':
                (samples[-1][2] - samples[0][2]) / samples[-1][0],
            'deflated per second':
                (samples[-1][3] - samples[0][3]) / samples[-1][0],
            'calls per second': calls / took,
            'events per second': events / took,
            'smallest': min(sample[1] for sample in samples),
            'largest': max(sample[1] for sample in samples),
            'vmstat': {key: after[key] - before[key] for key in REASONS},
            'counters': self.counters(),
            'samples': samples,
        }


def parse():
    '''The command line'''
    parser = argparse.ArgumentParser()
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--reps', type=int, required=True)
    parser.add_argument('--policy', choices=POLICIES, action='append')
    parser.add_argument('--scenario', choices=SCENARIOS, action='append')
    parser.add_argument('--device-property', action='append', default=[])
    parser.add_argument('--json', required=True)
    return parser.parse_args()


def plan(options):
    '''
    What to run: scenario, policy, feature bit, property of the device.
    Without the feature, all policies behave the same, so this is measured
    once.  Properties are only used in the loop.
    '''
    for rep in range(options.reps):
        for scenario in options.scenario or SCENARIOS:
            for policy in options.policy or POLICIES:
                if rep == 0 or scenario == 'oom':
                    yield scenario, policy, 'off', ''
                yield scenario, policy, 'on', ''
                if scenario == 'loop':
                    for prop in options.device_property:
                        yield scenario, policy, 'on', prop


def main():
    '''Run all guests, and write the results.'''
    options = parse()
    runs = []
    with tempfile.NamedTemporaryFile(dir='.') as file:
        for _ in range(FILE // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        for scenario, policy, bit, prop in plan(options):
            say(f'{scenario}: {policy}, deflate-on-oom={bit} {prop}')
            run = Run(scenario, policy, bit, prop, file.name, options.quick)
            output = io.StringIO()
            result = unittest.TextTestRunner(stream=output).run(run)
            if not result.wasSuccessful() or result.skipped:
                print(output.getvalue(), result.skipped, file=sys.stderr)
                sys.exit(1)
            runs.append(run.result)
            # Keep the results so far if a later run fails.
            with open(options.json, 'w', encoding='utf-8') as out:
                json.dump({'memory': RAM // MIB, 'target': TARGET // MIB,
                           'runs': runs}, out)


main()
