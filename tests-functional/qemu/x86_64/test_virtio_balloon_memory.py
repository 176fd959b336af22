#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# A Linux guest that migrates while most of its memory is in the balloon
'''Memory that the host needs for a guest with a virtio-balloon to migrate'''

import contextlib
import os
import re
import sys
import unittest

from qemu.machine.machine import VMLaunchFailure

from virtio_balloon_guest import MIB
from virtio_balloon_migration import BalloonMigrationTest

HUGE_PAGE = 2 * MIB
HUGE_PAGES = '/sys/kernel/mm/hugepages/hugepages-2048kB'

# Name: the memory backend
BACKENDS = {
    'anonymous': 'memory-backend-ram',
    'memfd': 'memory-backend-memfd,share=on',
    'hugetlb': 'memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M',
}

# Name: capabilities of the migration
MODES = {
    'plain': {},
    'multifd': {'multifd': True},
}

# By default, Debian's kernels fill pages with zeros when they are allocated,
# also those that go into the balloon.  Then the destination does not need
# memory for them, even if the source did not discard them.
#
# Depending on where the kernel is, some more MiB are in use that contain
# zeros.
CMDLINE = 'init_on_alloc=0 nokaslr'

# The rows of the table
ROWS = [(impl, backend, mode) for impl in ('C', 'Rust')
        for backend in BACKENDS for mode in MODES]

if os.getenv('BALLOON_QUICK') == '1':
    ROWS = [('C', 'memfd', 'plain'),
            ('Rust', 'memfd', 'plain'),
            ('Rust', 'memfd', 'multifd')]

# The columns: what the host has allocated for the guest, for a migration of a
# guest that does nothing, and for one of a guest that writes meanwhile
COLUMNS = ['before', 'source', 'destination',
           'writing: before', 'source', 'destination']


def number_in(name):
    '''What the kernel says about huge pages'''
    with open(f'{HUGE_PAGES}/{name}', encoding='ascii') as file:
        return int(file.read())


def discards(row):
    '''
    Whether the host can discard what Linux inflates.  C does not discard huge
    pages.
    '''
    impl, backend, _ = row
    return backend != 'hugetlb' or impl == 'Rust'


class VirtioBalloonMemory(BalloonMigrationTest):
    '''
    Migration does not allocate memory for pages that the host has discarded.
    '''

    TARGET = 240 * MIB

    # How much of its memory the guest has used before it is inflated.  With
    # less than 64 MiB left, the guest may run out of memory.
    USED = BalloonMigrationTest.RAM * 85 // 100
    SPARE = 64 * MIB

    # What the guest writes while it migrates for the second time
    WRITTEN = 40 * MIB
    CHUNK = 4 * MIB
    # It has to go to pages without memory on the source.  The pages that the
    # guest has free under the balloon have been used before, so it gets more
    # from the balloon, and will use these first.
    DEFLATED = WRITTEN + 8 * MIB

    FAST = {'max-bandwidth': 1 << 34, 'downtime-limit': 2000}
    # So slow that what the guest writes all the time takes a quarter of a
    # second, in which the guest will write it again
    SLOW = {'max-bandwidth': 96 * MIB, 'downtime-limit': 1}
    BUSY = 24

    cells = {}

    @classmethod
    def tearDownClass(cls):
        '''Print the table as comments, which TAP ignores.'''
        names = {row: ', '.join(row) for row in ROWS}
        first = max(len(name) for name in names.values())
        lines = ['MiB in use'.ljust(first) + ' | ' + ' | '.join(COLUMNS)]
        for row, name in names.items():
            cells = cls.cells.get(row, [])
            cells = cells + ['-'] * (len(COLUMNS) - len(cells))
            lines.append(name.ljust(first) + ' | ' + ' | '.join(
                str(cell).rjust(len(column))
                for cell, column in zip(cells, COLUMNS)))
        for line in lines:
            print('# ' + line)
        sys.stdout.flush()
        super().tearDownClass()

    def in_use(self, vm):
        '''The memory that the host has allocated for the guest, in bytes'''
        proc = f'/proc/{vm.get_pid()}'
        for fd in os.listdir(f'{proc}/fd'):
            # QEMU may have closed it
            with contextlib.suppress(FileNotFoundError):
                path = f'{proc}/fd/{fd}'
                stat = os.stat(path)
                if os.readlink(path).startswith('/memfd:') \
                        and stat.st_size == self.RAM:
                    # Unlike the resident size, this includes pages that have
                    # memory but are not mapped.
                    return stat.st_blocks * 512
        with open(f'{proc}/smaps', encoding='utf-8') as smaps:
            sizes = re.findall(rf'^Size: +{self.RAM // 1024} kB\n(?s:.*?)'
                               r'^Rss: +(\d+) kB$', smaps.read(), re.MULTILINE)
        self.assertEqual(len(sizes), 1, 'not one mapping with the size of RAM')
        return int(sizes[0]) * 1024

    def measure(self, row, vm):
        '''Fill in the next cell of a row; return its value in bytes.'''
        value = self.in_use(vm)
        self.cells[row].append(value // MIB)
        return value

    def check_near(self, value, expected):
        '''A value in bytes differs by at most 10 %.'''
        self.assertLessEqual(abs(value - expected), expected // 10,
                             f'{value // MIB} MiB in use instead of'
                             f' {expected // MIB}')

    def require_huge_pages(self):
        '''Skip the test if the host cannot provide them for two QEMUs.'''
        needed = 2 * self.RAM // HUGE_PAGE
        try:
            free = number_in('free_hugepages') - number_in('resv_hugepages')
        except OSError as exc:
            self.skipTest(f'no huge pages: {exc}')
        if free < needed:
            self.skipTest(f'{free} huge pages are free, but two QEMUs need'
                          f' {needed}')

    @contextlib.contextmanager
    def launching(self, row):
        '''Launch a QEMU, for which there were enough huge pages before.'''
        try:
            yield
        except VMLaunchFailure as exc:
            if row[1] == 'hugetlb' and 'unable to map backing' in str(exc):
                self.skipTest('another process has taken the huge pages')
            raise

    def arguments(self, row):
        '''What both QEMUs are started with'''
        impl, backend, _ = row
        huge = (impl, backend) == ('Rust', 'hugetlb')
        return (',huge-pages=on' if huge else '', CMDLINE,
                ('-object', f'{BACKENDS[backend]},id=ram0,size={self.RAM}',
                 '-machine', 'memory-backend=ram0'))

    def destination(self, row):
        '''A QEMU that waits for the guest, and its URI'''
        impl, _, mode = row
        with self.launching(row):
            return self.incoming(impl, *self.arguments(row), **MODES[mode])

    def use_all_memory(self):
        '''Write to most of the memory, and free it again.'''
        self.guest_ok('mkdir -p /used'
                      ' && mount -t tmpfs -o size=100% used /used')
        count = (self.meminfo()['MemFree'] - self.SPARE) // (8 * MIB)
        # Not zeros, for which the destination would allocate nothing
        self.guest_ok(f'for i in $(seq {count}); do dd if=/data/random'
                      ' of=/used/$i bs=1M count=8 2>/dev/null || exit 1; done')
        self.assertGreater(self.in_use(self.vm), self.USED)
        self.guest_ok('umount /used')

    def start(self, src, uri, parameters):
        '''Start a migration.'''
        # With machine types before 9.0, the threads of multifd leave it to the
        # main thread to find pages of zeros.
        src.cmd('migrate-set-parameters',
                **{'zero-page-detection': 'multifd', **parameters})
        src.cmd('migrate', uri=uri)

    def keep_busy(self):
        '''
        Write to the same pages all the time, so that the migration is not
        completed until the guest may be stopped for longer.
        '''
        command = ('dd if=/data/random of=/data/busy bs=1M conv=notrunc'
                   f' count={self.BUSY} 2>/dev/null')
        self.guest_ok(f'{command} && touch /data/go'
                      f' && (while [ -e /data/go ]; do {command}; done &)')

    def write_chunk(self, number):
        '''Copy a part of the random data.'''
        blocks = self.CHUNK // 65536
        self.guest_ok('dd if=/data/random of=/data/new bs=64k conv=notrunc'
                      f' count={blocks} skip={number * blocks}'
                      f' seek={number * blocks}')

    def write_meanwhile(self, src, size):
        '''
        During a migration with the given number of bytes to send, write to
        pages that have no memory yet.
        '''
        def ram(key):
            return self.migration(src).get('ram', {}).get(key, 0)

        self.set_balloon(self.TARGET + self.DEFLATED)
        chunks = self.WRITTEN // self.CHUNK
        for number in range(chunks // 2):
            # These may go to pages that the source has not looked at yet
            part = number * size // chunks
            self.wait_for(lambda part=part: ram('transferred') >= part,
                          'a part of the migration')
            self.write_chunk(number)
        # The others go to pages that were already found to be zero
        self.wait_for(lambda: ram('dirty-sync-count') > 1,
                      'all pages to be looked at')
        src.cmd('migrate-set-parameters', **self.CRAWL)
        for number in range(chunks // 2, chunks):
            self.write_chunk(number)
        self.assertEqual(self.migration(src)['status'], 'active')

    def check_idle(self, row):
        '''Migrate a guest that does nothing.'''
        src = self.vm
        before = self.measure(row, src)
        if discards(row):
            self.assertLess(before, self.TARGET)
        else:
            self.assertGreater(before, self.USED)
        dst, uri = self.destination(row)
        self.start(src, uri, self.FAST)
        self.wait_migration(src, 'completed')
        after = self.measure(row, src), self.measure(row, dst)
        self.switch_to(dst)
        for value in after:
            self.check_near(value, before)

    def check_writing(self, row, checksum):
        '''Migrate a guest that writes.'''
        src = self.vm
        self.keep_busy()
        before = self.measure(row, src)
        dst, uri = self.destination(row)
        self.start(src, uri, self.SLOW)
        self.write_meanwhile(src, before)
        src.cmd('migrate-set-parameters', **self.FAST)
        self.wait_migration(src, 'completed')
        after = self.measure(row, src), self.measure(row, dst)
        self.switch_to(dst)
        # If pages are lost, the guest may have crashed
        out = self.guest_ok('rm /data/go && md5sum /data/random /data/new',
                            timeout=60)
        self.assertEqual(out.split()[::2], [checksum, checksum])
        self.assertEqual(self.actual(), self.TARGET + self.DEFLATED)
        # Otherwise, much of it went to pages that already had memory
        self.assertGreater(after[0], before + self.WRITTEN * 3 // 4)
        for value in after:
            self.check_near(value, before + self.WRITTEN)

    def check_row(self, row):
        '''Fill in and check a row of the table.'''
        if row[1] == 'hugetlb':
            self.require_huge_pages()
        with self.launching(row):
            self.boot(row[0], *self.arguments(row))
        checksum = self.make_data(self.WRITTEN // MIB)
        self.use_all_memory()
        self.set_balloon(self.TARGET)
        self.check_idle(row)
        self.assertEqual(self.checksum(), checksum)
        # Otherwise there are no pages without memory on the source
        if discards(row):
            self.check_writing(row, checksum)

    def check(self, row):
        '''Fill in and check a row of the table, or say that it is skipped.'''
        self.cells[row] = []
        try:
            self.check_row(row)
        except unittest.SkipTest:
            self.cells[row] = ['skip'] * len(COLUMNS)
            raise


def add_rows():
    '''One test for each row of the table'''
    for row in ROWS:
        def test(self, row=row):
            self.check(row)
        test.__doc__ = f'Memory in use with: {", ".join(row)}'
        setattr(VirtioBalloonMemory, 'test_' + '_'.join(row).lower(), test)


add_rows()


if __name__ == '__main__':
    BalloonMigrationTest.main()
