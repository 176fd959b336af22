#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Show the effect of deflate-on-oom
'''Boot a guest that runs out of memory, without and with deflate-on-oom.'''

import io
import os
import subprocess
import sys
import time
import unittest

from virtio_balloon_guest import BalloonGuestTest, MIB

RESULTS = {}
START = time.monotonic()


def progress(what):
    '''Tell the user what is going on.'''
    print(f'[{time.monotonic() - START:4.0f} s] {what}',
          file=sys.stderr, flush=True)


class Demo(BalloonGuestTest):
    '''The two runs'''

    def scenario(self, mode):
        '''Boot the guest once.'''
        progress(f'deflate-on-oom={mode}: booting Linux')
        self.launch(f',deflate-on-oom={mode}')
        progress(f'deflate-on-oom={mode}: balloon down to '
                 f'{self.TARGET // MIB} MiB, then a process uses '
                 f'{self.HOG // MIB} MiB')
        RESULTS[mode] = self.oom_scenario()
        RESULTS[mode]['counters'] = self.host_property('balloon-counters')

    def test_1_off(self):
        '''Without deflate-on-oom'''
        self.scenario('off')

    def test_2_on(self):
        '''With deflate-on-oom'''
        self.scenario('on')


def expected(mode, result):
    '''What is wrong with the result, if anything.'''
    if result is None:
        return 'the guest did not get that far'
    if result['bit 2'] != ('1' if mode == 'on' else '0'):
        return 'the guest does not see the right feature bit'
    if result['before'] != Demo.TARGET:
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


def outcome(code):
    '''What the exit code of the process means'''
    return {0: '0 (survived)', 137: '137 (killed)'}.get(code, str(code))


def report():
    '''Print what happened; return whether it is what should happen.'''
    qemu = os.environ['QEMU_TEST_QEMU_BINARY']
    version = subprocess.run([qemu, '--version'], capture_output=True,
                             check=True, text=True).stdout.splitlines()[0]
    good = True
    print(f'{qemu}\n{version}')
    for mode in ('off', 'on'):
        result = RESULTS.get(mode)
        print(f'\n-device virtio-balloon-pci,deflate-on-oom={mode}')
        if result:
            print(f"  guest kernel                     {result['kernel']}")
            print(f"  feature bit 2 seen by the guest  {result['bit 2']}")
            print(f"  exit of the process              "
                  f"{outcome(result['exit'])}")
            print(f"  memory of the guest before       "
                  f"{result['before'] // MIB} MiB")
            print(f"  memory of the guest after        "
                  f"{result['after'] // MIB} MiB")
            counters = result['counters']
            print(f"  inflated, deflated unasked       "
                  f"{counters['pages-inflated'] * 4096 // MIB} MiB, "
                  f"{counters['pages-deflated-unasked'] * 4096 // MIB} MiB")
            for line in result['killed']:
                print(f'  guest log: {line}')
        wrong = expected(mode, result)
        print('  => ' + (f'NOT as expected: {wrong}' if wrong else {
            'off': 'the guest ran out of memory and killed the process',
            'on': 'the guest took pages out of the balloon instead',
        }[mode]))
        good = good and not wrong
    return good


def main():
    '''Run and report.'''
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(Demo)
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
