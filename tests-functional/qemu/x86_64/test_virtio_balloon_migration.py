#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# A Linux guest with a memory balloon that migrates between implementations
'''Migration of a Linux guest with a virtio-balloon'''

import itertools
import os
import re
import sys
import time
import traceback
import unittest

from virtio_balloon_guest import MIB
from virtio_balloon_migration import (
    BalloonMigrationTest, CMD_ID_DONE, CMD_ID_STOP, F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT, F_PAGE_POISON, F_REPORTING, POISON_CMDLINE)

HINT = ',free-page-hint=on,iothread=iothread0'

# Name: options, features that have to be negotiated
MIXES = {
    'plain': ('', []),
    'deflate-on-oom': (',deflate-on-oom=on', [F_DEFLATE_ON_OOM]),
    'free-page-hint': (HINT, [F_FREE_PAGE_HINT]),
    'page-poison': (',page-poison=on', [F_PAGE_POISON]),
    'no page-poison': (',page-poison=off', []),
    'reporting': (',free-page-reporting=on', [F_REPORTING]),
    'everything': (
        ',deflate-on-oom=on,free-page-reporting=on' + HINT,
        [F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_PAGE_POISON, F_REPORTING]),
}

if os.getenv('BALLOON_QUICK') == '1':
    MIXES = {name: MIXES[name] for name in ('plain', 'everything')}

# The guest migrates through all QEMUs of a chain
CHAINS = [
    ['C', 'Rust', 'C', 'Rust', 'Rust'],
    ['stock', 'Rust', 'stock'],
    ['latest', 'Rust', 'latest', 'C', 'latest'],
]


def hops(chain):
    '''The columns of the table for a chain'''
    return [f'{number}: {src}->{dst}'
            for number, (src, dst) in enumerate(zip(chain, chain[1:]), 1)]


class VirtioBalloonMatrix(BalloonMigrationTest):
    '''A guest migrates from one QEMU to the next one.'''

    cells = {}

    @classmethod
    def tearDownClass(cls):
        '''Print a table for each chain as comments, which TAP ignores.'''
        first = max(len(mix) for mix in MIXES)
        lines = []
        for number, chain in enumerate(CHAINS):
            columns = hops(chain)
            lines.append(' ' * first + ' | ' + ' | '.join(columns))
            for mix in MIXES:
                cells = [cls.cells.get((mix, number, hop), '-')
                         .center(len(hop)) for hop in columns]
                lines.append(mix.ljust(first) + ' | ' + ' | '.join(cells))
        for line in lines:
            print('# ' + line.rstrip())
        sys.stdout.flush()
        super().tearDownClass()

    def fill(self, mix, number, value, start=0):
        '''Fill in the rest of a row.'''
        for hop in hops(CHAINS[number])[start:]:
            self.cells[mix, number, hop] = value

    def visit(self, mix, number):
        '''Take a guest through a chain.'''
        options, features = MIXES[mix]
        poison = F_PAGE_POISON in features
        cmdline = POISON_CMDLINE if poison else ''
        chain = CHAINS[number]
        self.fill(mix, number, 'FAIL')
        self.boot(chain[0], options, cmdline)
        negotiated = self.guest_features()
        lacking = [bit for bit in features if negotiated[bit] != '1']
        if lacking:
            self.fill(mix, number, 'skip')
            self.skipTest(f'no features {lacking} in the guest')
        if poison:
            self.guest_poison()
        checksum = self.make_data()
        self.set_balloon(self.TARGET)
        before = self.state()
        self.assertEqual(before['checksum'], checksum)
        # The length depends on the features that are offered
        self.assertEqual(len(before['config']),
                         2 if ',page-poison=off' in options else 4)
        self.assertEqual(before['config'][:2],
                         [(self.RAM - self.TARGET) // 4096] * 2)

        for hop, impl in zip(hops(chain), chain[1:]):
            self.log.info('%s, %s', mix, hop)
            self.migrate(impl, options, cmdline)
            after = self.state()
            if F_FREE_PAGE_HINT in features:
                self.assertEqual(after['config'][2], CMD_ID_DONE)
                before['config'][2] = CMD_ID_DONE
            self.assertEqual(after, before)
            self.check_stats()
            self.check_balloon()
            if F_DEFLATE_ON_OOM in features:
                self.check_oom()
            self.assertEqual(self.state(), before)
            self.cells[mix, number, hop] = 'ok'

    def check_row(self, mix):
        '''All hops with one mix of features'''
        errors = []
        skipped = []
        for number, chain in enumerate(CHAINS):
            if not all(self.binary(impl) for impl in chain):
                self.fill(mix, number, 'skip')
                continue
            try:
                with self.part('->'.join(chain)):
                    self.visit(mix, number)
            except unittest.SkipTest as exc:
                skipped.append(str(exc))
            # Continue with the other chains
            except Exception:
                errors.append(traceback.format_exc())
            self.vm.shutdown(hard=True)
        if errors:
            self.fail('\n'.join(errors))
        if skipped:
            self.skipTest(skipped[0])


def add_matrix():
    '''One test for each mix of features'''
    for mix in MIXES:
        def test(self, mix=mix):
            self.check_row(mix)
        test.__doc__ = f'Hops with: {mix}'
        name = 'test_' + re.sub('[^a-z0-9]+', '_', mix)
        setattr(VirtioBalloonMatrix, name, test)


add_matrix()


class VirtioBalloonMigration(BalloonMigrationTest):
    '''Other events during a migration'''

    def errors(self, vm):
        '''What QEMU printed; it has to have exited.'''
        vm.wait(timeout=self.timeout)
        log = vm.get_log() or ''
        return [re.sub(r'^\S*qemu\S*: ', '', line)
                for line in log.splitlines()
                if 'terminating on signal' not in line
                and 'deprecated' not in line]

    def check_mismatch(self, src_options, dst_options, expected, cmdline=''):
        '''
        Try to migrate to destinations with other properties.  C and Rust have
        to fail for the same reason.
        '''
        for src in ['C', 'Rust']:
            self.boot(src, src_options, cmdline)
            self.make_data(2)
            self.set_balloon(self.TARGET)
            before = self.state()
            said = {}
            for dst in ['C', 'Rust']:
                vm, uri = self.incoming(dst, dst_options, cmdline)
                self.vm.cmd('migrate', uri=uri)
                self.wait_migration(self.vm, 'failed')
                said[dst] = self.errors(vm)
                self.assertNotEqual(vm.exitcode(), 0)
                self.wait_for(lambda: self.vm.cmd('query-status')['status']
                              == 'running', 'the guest to go on')
                if HINT in src_options:
                    before['config'][2] = CMD_ID_DONE
                self.assertEqual(self.state(), before)
                self.check_stats()
                self.check_balloon()
            self.log.info('%s: %s', src, said['C'])
            self.assertEqual(said['C'], said['Rust'])
            self.assertTrue([line for line in said['C']
                             if re.search(expected, line)], said['C'])
            # The guest can still migrate to a destination with the same
            # properties
            self.migrate('Rust', src_options, cmdline)
            self.assertEqual(self.state(), before)
            self.vm.shutdown()

    def test_mismatch_deflate_on_oom(self):
        '''The destination does not have the feature.'''
        self.check_mismatch(
            ',deflate-on-oom=on', ',deflate-on-oom=off',
            'Features 0x[0-9a-f]+ unsupported. Allowed features: 0x')

    def test_mismatch_page_poison(self):
        '''The destination does not have the feature.'''
        self.check_mismatch(
            ',page-poison=on', ',page-poison=off',
            'Features 0x[0-9a-f]+ unsupported. Allowed features: 0x',
            POISON_CMDLINE)

    def test_mismatch_reporting(self):
        '''The destination has fewer queues.'''
        self.check_mismatch(
            ',free-page-reporting=on', ',free-page-reporting=off',
            'VQ 3 |Features 0x[0-9a-f]+ unsupported|load of migration failed')

    def test_mismatch_hint(self):
        '''The destination has fewer queues.'''
        self.check_mismatch(
            HINT, '', 'VQ 3 |Features 0x[0-9a-f]+ unsupported'
            '|load of migration failed')

    def test_file(self):
        '''The guest is migrated to a file, and later from it.'''
        options = ',deflate-on-oom=on,free-page-reporting=on' + HINT
        for src, dst in [('C', 'Rust'), ('Rust', 'C'), ('Rust', 'Rust')]:
            with self.part(f'{src}->{dst}'):
                self.boot(src, options)
                self.make_data()
                self.set_balloon(self.TARGET)
                before = self.state()
                uri = 'file:' + self.scratch_file('state')
                self.vm.cmd('migrate', uri=uri)
                self.wait_migration(self.vm, 'completed')
                self.vm.shutdown()

                vm = self.new_qemu(dst, options, args=('-incoming', 'defer'))
                vm.launch()
                vm.cmd('migrate-incoming', uri=uri)
                self.switch_to(vm)
                before['config'][2] = CMD_ID_DONE
                self.assertEqual(self.state(), before)
                self.check_stats()
                self.check_balloon()
                self.check_oom()
                self.assertEqual(self.state(), before)
            self.vm.shutdown()

    def check_postcopy(self, src, dst):
        '''Inflate the balloon while postcopy is active.'''
        trace = self.scratch_file(f'{src}-{dst}.trace')
        self.boot(src)
        # Data that the destination does not have when postcopy begins
        self.make_data(64)
        checksum = self.checksum()
        try:
            vm, uri = self.incoming(
                dst, args=('-trace', 'virtio_balloon_handle_output',
                           '-trace', 'ram_block_discard_*',
                           '-trace', 'loadvm_postcopy_handle_run',
                           '-trace', 'postcopy_ram_listen_thread_exit',
                           '-D', trace), postcopy_ram=True)
        # pylint: disable=broad-except
        except Exception as exc:
            if 'ostcopy' in str(exc) or 'serfault' in str(exc):
                self.skipTest(f'no postcopy: {exc}')
            raise
        source = self.vm
        self.crawl(source)
        source.cmd('migrate', uri=uri)
        self.wait_for(lambda: self.migration(source).get('status') == 'active'
                      and self.migration(source)['ram']['transferred'] > MIB,
                      'the migration to start')
        source.cmd('migrate-start-postcopy')
        self.wait_for(lambda: vm.cmd('query-status')['status'] == 'running',
                      'postcopy')
        # The state of the devices is sent first ("postcopy-device")
        self.wait_for(lambda: self.migration(source)['status']
                      == 'postcopy-active', 'the source to notice')
        vm.cmd('balloon', value=self.RAM - 200 * MIB)
        self.wait_for(lambda: vm.cmd('query-balloon')['actual']
                      < self.RAM - 40 * MIB, 'inflation')
        if dst == 'Rust':
            status = vm.cmd('qom-get', path=self.BALLOON,
                            property='balloon-status')
            self.assertEqual(status['inhibited-by'], ['incoming-postcopy'])
            self.assertEqual(status['summary'], 'memory is not returned to the'
                             ' host until postcopy migration is complete')
        self.assertEqual(self.migration(source)['status'], 'postcopy-active',
                         'the migration was too fast for the test')
        # The balloon was inflated during postcopy; let the migration end
        source.cmd('migrate-set-parameters',
                   **{'max-postcopy-bandwidth': 0})
        self.wait_migration(source, 'completed')
        self.switch_to(vm)
        self.wait_for(lambda: self.actual() == self.RAM - 200 * MIB,
                      'inflation')
        self.assertEqual(self.checksum(), checksum)
        self.check_stats()
        self.check_balloon()
        self.assertEqual(self.checksum(), checksum)
        self.vm.shutdown()

        with open(trace, encoding='utf-8', errors='replace') as file:
            lines = file.read().splitlines()
        names = [line.split()[0] for line in lines if line]
        self.assertIn('virtio_balloon_handle_output', names,
                      'this needs a QEMU that traces to a log')
        run = names.index('loadvm_postcopy_handle_run')
        end = names.index('postcopy_ram_listen_thread_exit')
        during = names[run:end]
        self.assertGreaterEqual(during.count('virtio_balloon_handle_output'),
                                40 * MIB // 4096)

        def discards(names):
            return [name for name in names
                    if name.startswith('ram_block_discard_')]

        self.assertEqual(discards(during), [])
        self.assertNotEqual(discards(names[end:]), [])

    def test_postcopy(self):
        '''The destination discards nothing while pages are still to arrive.'''
        for src, dst in [('C', 'Rust'), ('Rust', 'C'), ('Rust', 'Rust')]:
            with self.part(f'{src}->{dst}'):
                self.check_postcopy(src, dst)

    def migrate_partly(self, options, dst):
        '''Begin a slow migration; return the destination.'''
        vm, uri = self.incoming(dst, options)
        self.crawl(self.vm)
        self.vm.cmd('migrate', uri=uri)

        def begun():
            info = self.migration()
            self.assertNotIn(info.get('status'), ('completed', 'failed'))
            return info.get('status') == 'active' \
                and info['ram']['transferred'] > 2 * MIB

        self.wait_for(begun, 'a part of the migration')
        return vm

    def test_cancel(self):
        '''The migration is canceled, and the guest stays at the source.'''
        options = ',deflate-on-oom=on,free-page-reporting=on' + HINT
        for src, dst in [('C', 'Rust'), ('Rust', 'C'), ('Rust', 'Rust')]:
            with self.part(f'{src}->{dst}'):
                self.boot(src, options)
                self.make_data(32)
                self.set_balloon(self.TARGET)
                before = self.state()
                vm = self.migrate_partly(options, dst)
                # the balloon still works during the migration
                self.set_balloon(self.TARGET - 32 * MIB)
                self.set_balloon(self.TARGET)
                self.wait_cancelled(self.vm)
                vm.shutdown(hard=True)
                if before['config'][2] == CMD_ID_STOP:
                    before['config'][2] = CMD_ID_DONE
                self.assertEqual(self.state(), before)
                self.check_stats()
                self.check_balloon()
                self.check_oom()
                self.migrate(dst, options)
                self.assertEqual(self.state(), before)
                self.check_stats()
                self.check_balloon()
                self.check_oom()
            self.vm.shutdown()


class VirtioBalloonHinting(BalloonMigrationTest):
    '''Free pages need not be migrated.'''

    RAM = 1024 * MIB

    # Amount of memory that the guest will hint
    HINTED = 500 * MIB

    def idle_guest(self, impl, options):
        '''A guest that has used most of its memory'''
        self.boot(impl, options)
        if 'free-page-hint' in options:
            self.require_feature(F_FREE_PAGE_HINT, 'free page hinting')
        self.make_data(32)
        # Zero pages are not migrated anyway
        self.guest_ok('mkdir -p /used && mount -t tmpfs -o size=90% used /used'
                      ' && dd if=/data/random of=/used/0 bs=1M')
        self.guest_ok(
            'for i in $(seq 1 22); do cat /used/0 > /used/$i || exit 1; done')
        self.guest_ok('rm /used/*; umount /used')

    def free_memory(self):
        '''Memory that the guest does not use'''
        return self.meminfo()['MemFree']

    def wait_for_hints(self, free):
        '''Wait until the guest has hinted at most of its free memory.'''
        self.wait_for(lambda: self.free_memory() < free - self.HINTED,
                      'the guest to give hints')

    def transferred(self, src, dst, options):
        '''Migrate an idle guest; return how many bytes were transferred.'''
        self.idle_guest(src, options)
        before = self.state()
        free = self.free_memory()
        if 'free-page-hint' in options:
            # Give the guest time to hint its free pages
            info = self.migrate(dst, options,
                                meanwhile=lambda: self.wait_for_hints(free))
            before['config'][2] = CMD_ID_DONE
        else:
            info = self.migrate(dst, options)
        self.assertEqual(self.state(), before)
        self.wait_for(lambda: self.free_memory() > free - 32 * MIB,
                      'the guest to have its free pages again')
        self.check_stats()
        # now use all free pages
        self.assertEqual(self.run_in_guest(
            'dd if=/dev/zero of=/dev/null bs=700M count=1')[0], 0)
        self.assertEqual(self.checksum(), before['checksum'])
        self.set_balloon(self.RAM // 2)
        self.set_balloon(self.RAM)
        self.vm.shutdown()
        return info['ram']['transferred']

    def test_transferred(self):
        '''With hints, there is less to transfer.'''
        without = self.transferred('Rust', 'Rust', '')
        self.assertGreater(without, 600 * MIB)
        result = {'without': without // MIB}
        for src, dst in [('Rust', 'Rust'), ('C', 'Rust'), ('Rust', 'C')]:
            with self.part(f'{src}->{dst}'):
                hinted = self.transferred(src, dst, HINT)
                result[f'{src}->{dst}'] = hinted // MIB
                # Some pages are sent before they are hinted
                self.assertLess(hinted, without - self.HINTED * 3 // 4)
        self.log.info('MiB transferred: %s', result)
        if os.getenv('BALLOON_VERBOSE'):
            print(result, file=sys.__stdout__)

    def transferred_meanwhile(self, meanwhile):
        '''
        Migrate an idle guest at 64 MiB/s, and call a function all the time;
        return how many bytes were transferred.
        '''
        self.idle_guest('Rust', HINT)
        checksum = self.checksum()
        src = self.vm
        dst, uri = self.incoming('Rust', HINT)
        src.cmd('migrate-set-parameters', **{'max-bandwidth': 64 * MIB})
        src.cmd('migrate', uri=uri)
        while self.migration(src).get('status') not in ('completed', 'failed'):
            meanwhile(src)
            time.sleep(0.02)
        info = self.migration(src)
        self.switch_to(dst)
        self.assertEqual(self.checksum(), checksum)
        self.vm.shutdown()
        return info['ram']['transferred']

    @unittest.skipIf(os.getenv('BALLOON_QUICK') == '1', 'takes minutes')
    def test_configuration_interrupts(self):
        '''
        Hinting continues while the user or a management tool changes the size
        of the balloon: the driver reads the command ID again, which has not
        changed.
        '''
        alone = self.transferred_meanwhile(lambda vm: None)
        sizes = itertools.cycle([self.RAM - MIB, self.RAM])
        adjusted = self.transferred_meanwhile(
            lambda vm: vm.cmd('balloon', value=next(sizes)))
        self.log.info('MiB transferred: %d, adjusted: %d',
                      alone // MIB, adjusted // MIB)
        if os.getenv('BALLOON_VERBOSE'):
            print(alone // MIB, adjusted // MIB, file=sys.__stdout__)
        # Both results depend on how fast the guest is.
        self.assertLess(adjusted, alone * 13 // 10 + 64 * MIB)

    def test_cancel(self):
        '''The guest gets its pages back if the migration is canceled.'''
        for impl in ['C', 'Rust']:
            with self.part(impl):
                self.idle_guest(impl, HINT)
                before = self.state()
                free = self.free_memory()
                vm, uri = self.incoming('Rust', HINT)
                self.crawl(self.vm)
                self.vm.cmd('migrate', uri=uri)
                self.wait_for_hints(free)
                self.wait_cancelled(self.vm)
                vm.shutdown(hard=True)
                self.wait_for(lambda: self.free_memory() > free - 32 * MIB,
                              'the guest to have its free pages again')
                before['config'][2] = CMD_ID_DONE
                self.assertEqual(self.state(), before)
                self.check_stats()
                self.assertEqual(self.run_in_guest(
                    'dd if=/dev/zero of=/dev/null bs=700M count=1')[0], 0)
                self.assertEqual(self.checksum(), before['checksum'])
            self.vm.shutdown()


if __name__ == '__main__':
    BalloonMigrationTest.main()
