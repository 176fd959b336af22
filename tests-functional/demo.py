#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Show the effects of deflate-on-oom and free-page-reporting
'''
Boot a guest that runs out of memory, without and with deflate-on-oom, and one
that frees memory, with free-page-reporting.
'''

import contextlib
import io
import os
import subprocess
import sys
import time
import unittest

from virtio_balloon_guest import BalloonGuestTest, MIB

RESULTS = {}
START = time.monotonic()

# The summary of balloon-status that everybody wants to see
GOOD = 'the balloon has the size that was asked for'

# The options of the device in each part
OPTIONS = {
    'off': 'deflate-on-oom=off',
    'on': 'deflate-on-oom=on',
    'reporting': 'free-page-reporting=on,deflate-on-oom=on',
}


def progress(what):
    '''Tell the user what is going on.'''
    print(f'[{time.monotonic() - START:4.0f} s] {what}',
          file=sys.stderr, flush=True)


class DemoTest(BalloonGuestTest):
    '''A part of the demo, which fills in its result'''

    # What the guest has done when its process starts
    READY = None

    result = None

    def start(self, part):
        '''Boot the guest.'''
        progress(f'{OPTIONS[part]}: booting Linux')
        self.result = RESULTS[part] = {'states': []}
        self.launch(',' + OPTIONS[part])

    def look(self, when):
        '''Note what the device says in a state of the guest.'''
        status = self.host_property('balloon-status')
        self.result['states'].append((when, status['summary']))

    def wait_console(self, pattern, timeout=None):
        '''The first time, Linux has not loaded the driver yet.'''
        if not self.result['states']:
            self.look('Linux boots')
        return super().wait_console(pattern, timeout)

    def use_memory(self):
        '''Look at the balloon before the process starts.'''
        self.look(self.READY)
        return super().use_memory()


class OomDemo(DemoTest):
    '''The guest needs memory that is in the balloon.'''

    READY = 'target reached'

    def scenario(self, mode):
        '''Boot the guest once.'''
        self.start(mode)
        progress(f'{OPTIONS[mode]}: balloon down to '
                 f'{self.TARGET // MIB} MiB, then a process uses '
                 f'{self.HOG // MIB} MiB')
        result = self.oom_scenario()
        self.look('process killed' if result['killed']
                  else 'guest has deflated')
        result['counters'] = self.host_property('balloon-counters')
        # There are all results, or only the states
        self.result.update(result)

    def test_1_off(self):
        '''Without deflate-on-oom'''
        self.scenario('off')

    def test_2_on(self):
        '''With deflate-on-oom'''
        self.scenario('on')


class ReportingDemo(DemoTest):
    '''The guest uses memory, and does not need it any more.'''

    RAM = 1024 * MIB
    HOG = 600 * MIB

    READY = 'idle'

    # For how long QEMU may keep memory that the guest has freed, in seconds
    PATIENCE = 60

    def processes(self):
        '''QEMU, and what it has started, as it can run in a sandbox'''
        found = [self.vm.get_pid()]
        for pid in found:
            # A process can end meanwhile
            with contextlib.suppress(OSError), open(
                    f'/proc/{pid}/task/{pid}/children',
                    encoding='ascii') as children:
                found += map(int, children.read().split())
        return found

    def memory(self, name):
        '''
        A value in bytes from /proc/PID/status of QEMU: "VmRSS", or its largest
        value "VmHWM"
        '''
        values = [0]
        for pid in self.processes():
            with contextlib.suppress(OSError), open(
                    f'/proc/{pid}/status', encoding='ascii') as status:
                values += [int(line.split()[1]) * 1024 for line in status
                           if line.startswith(name + ':')]
        # A sandbox needs next to nothing
        return max(values)

    def reported(self):
        '''What the guest has reported as free, in bytes'''
        return self.host_property('balloon-counters')['bytes-reported']

    def idle(self):
        '''Wait until QEMU's memory and the reports do not change.'''
        last = []

        def settled():
            # The driver reports with a delay of 2 s
            self.guest_sleep(2)
            last.append((self.memory('VmRSS'), self.reported()))
            sizes, reports = zip(*last[-3:])
            return (len(sizes) == 3 and len(set(reports)) == 1
                    and max(sizes) - min(sizes) < 2 * MIB)

        self.wait_for(settled, 'QEMU to settle')
        return last[-1]

    def test_3_reporting(self):
        '''With free-page-reporting'''
        self.start('reporting')
        result = self.result
        result['kernel'] = self.guest_kernel()
        result['bit 5'] = self.guest_features()[5]
        result['before'], reported = self.idle()
        result['limit'] = result['before'] + max(result['before'] // 10,
                                                 32 * MIB)
        progress(f"{OPTIONS['reporting']}: a process uses "
                 f'{self.HOG // MIB} MiB, and ends')
        result['exit'] = self.use_memory()
        start = time.monotonic()
        result['peak'] = self.memory('VmHWM')
        while (self.memory('VmRSS') > result['limit']
               and time.monotonic() < start + self.PATIENCE):
            time.sleep(0.2)
        result['seconds'] = time.monotonic() - start
        result['reported'] = self.reported() - reported
        self.look('memory was freed')
        # The last one, so that all the others are there if it is
        result['after'] = self.memory('VmRSS')


def expected_oom(mode, result):
    '''What is wrong with a guest that runs out of memory, if anything'''
    if result['bit 2'] != ('1' if mode == 'on' else '0'):
        return 'the guest does not see the right feature bit'
    if result['before'] != OomDemo.TARGET:
        return 'the balloon was not inflated'
    if mode == 'off':
        if result['exit'] != 137 or not result['killed']:
            return 'the process was not killed'
        if result['after'] != result['before']:
            return 'the balloon has changed'
    else:
        if result['exit'] != 0 or result['killed']:
            return 'the process was killed'
        if result['after'] <= result['before']:
            return 'the balloon did not shrink'
        if not result['counters']['pages-deflated-unasked']:
            return 'the device has not noticed it'
    return None


def expected_reporting(result):
    '''What is wrong with the guest that frees memory, if anything'''
    if result['bit 5'] != '1':
        return 'the guest does not see the right feature bit'
    if result['exit'] != 0:
        return 'the process has failed'
    # The guest may reuse memory that QEMU already had, and may report some
    # before the process ends.
    if result['peak'] < result['before'] + ReportingDemo.HOG // 2:
        return 'QEMU did not need more memory'
    if result['after'] > result['limit']:
        return (f"after {result['seconds']:.0f} s, QEMU still has"
                f" {result['after'] // MIB} MiB, and not at most"
                f" {result['limit'] // MIB}")
    if result['reported'] < ReportingDemo.HOG // 2:
        return 'the guest has not reported what it has freed'
    return None


def expected(part, result):
    '''What is wrong with the result, if anything.'''
    if 'after' not in result:
        return 'the guest did not get that far'
    summary = dict(result['states']).get(
        ReportingDemo.READY if part == 'reporting' else OomDemo.READY)
    if summary != GOOD:
        return f'before the process starts, the device says: {summary}'
    if part == 'reporting':
        return expected_reporting(result)
    return expected_oom(part, result)


def outcome(code):
    '''What the exit code of the process means'''
    return {0: '0 (survived)', 137: '137 (killed)'}.get(code, str(code))


def lines_oom(result):
    '''What to print of a guest that runs out of memory'''
    counters = result['counters']
    yield 'feature bit 2 seen by the guest', result['bit 2']
    yield 'exit of the process', outcome(result['exit'])
    yield 'memory of the guest before', f"{result['before'] // MIB} MiB"
    yield 'memory of the guest after', f"{result['after'] // MIB} MiB"
    yield ('inflated, deflated unasked',
           f"{counters['pages-inflated'] * 4096 // MIB} MiB, "
           f"{counters['pages-deflated-unasked'] * 4096 // MIB} MiB")
    for line in result['killed']:
        yield 'guest log', line


def lines_reporting(result):
    '''What to print of the guest that frees memory'''
    yield 'feature bit 5 seen by the guest', result['bit 5']
    yield "QEMU's memory before", f"{result['before'] // MIB} MiB"
    yield "QEMU's memory at the peak", f"{result['peak'] // MIB} MiB"
    yield "QEMU's memory after", (f"{result['after'] // MIB} MiB,"
                                  f" {result['seconds']:.0f} s later")
    yield 'reported as free', f"{result['reported'] // MIB} MiB"


def report():
    '''Print what happened; return whether it is what should happen.'''
    qemu = os.environ['QEMU_TEST_QEMU_BINARY']
    version = subprocess.run([qemu, '--version'], capture_output=True,
                             check=True, text=True).stdout.splitlines()[0]
    good = True
    print(f'{qemu}\n{version}')
    for part, options in OPTIONS.items():
        result = RESULTS.get(part, {'states': []})
        print(f'\n-device virtio-balloon-pci,{options}')
        lines = [(f'status: {when}', text) for when, text in result['states']]
        if 'after' in result:
            lines = [('guest kernel', result['kernel']),
                     *(lines_reporting if part == 'reporting'
                       else lines_oom)(result), *lines]
        for name, value in lines:
            print(f'  {name:32} {value}')
        wrong = expected(part, result)
        print('  => ' + (f'NOT as expected: {wrong}' if wrong else {
            'off': 'the guest ran out of memory and killed the process',
            'on': 'the guest took pages out of the balloon instead',
            'reporting': 'the memory that the guest has freed is back',
        }[part]))
        good = good and not wrong
    return good


def main():
    '''Run and report.'''
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    suite = unittest.TestSuite(map(load, [OomDemo, ReportingDemo]))
    log = io.StringIO()
    result = unittest.TextTestRunner(stream=log).run(suite)
    good = report() and result.wasSuccessful()
    if not result.wasSuccessful() or result.skipped:
        print(log.getvalue(), file=sys.stderr)
        for _, reason in result.skipped:
            print(reason, file=sys.stderr)
        good = False
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
