# SPDX-License-Identifier: GPL-2.0-or-later
#
# Linux guests with a memory balloon that move from one QEMU to another
'''Base classes for tests that need more than a booted guest'''

import contextlib
import os
import re
import sys

from qemu.machine import QEMUMachine

from virtio_balloon_guest import BalloonGuestTest, MIB, UNSET_STATS_VALUE

# Bits of the features
F_STATS_VQ = 1
F_DEFLATE_ON_OOM = 2
F_FREE_PAGE_HINT = 3
F_PAGE_POISON = 4
F_REPORTING = 5

# What the device puts into free_page_hint_cmd_id
CMD_ID_STOP = 0
CMD_ID_DONE = 1

# What Linux fills free pages with; it tells the device so
PAGE_POISON = 0xaaaaaaaa

# With CONFIG_PAGE_POISONING, page_poison wins.  Otherwise, it is ignored, but
# init_on_free suffices to negotiate the feature.
POISON_CMDLINE = 'page_poison=1 init_on_free=1'

CMDLINE = 'console=ttyS0 loglevel=1 panic=-1'

SYSFS = '/sys/bus/virtio/drivers/virtio_balloon'


class BalloonLinuxTest(BalloonGuestTest):
    '''What is known about the driver in the guest'''

    def guest_ok(self, command, timeout=None):
        '''Run a shell command that must not fail; return its output.'''
        status, out = self.run_in_guest(command, timeout)
        self.assertEqual(status, 0, f'{command}: {out}')
        return out

    @contextlib.contextmanager
    def part(self, what):
        '''A part of a test.  TAP knows no subtests.'''
        self.log.info('begin: %s', what)
        try:
            yield
        except BaseException:
            print(f'{self.id()}: in {what}', file=sys.stderr)
            raise
        self.log.info('end: %s', what)

    def require_feature(self, bit, name):
        '''Skip the test if the driver does not know a feature.'''
        if self.guest_features()[bit] != '1':
            self.skipTest(f'Linux {self.guest_kernel()} has no {name}')

    def virtio_device(self):
        '''The directory of the device in sysfs of the guest'''
        out = self.guest_ok(f'for d in {SYSFS}/virtio*; do echo $d; done')
        self.assertRegex(out, r'/virtio\d+\n')
        return out.strip()

    def guest_bar(self):
        '''
        The file in the guest for the first BAR, which has ports, and the
        offset of the configuration space in it, in words of 4 bytes
        '''
        path = self.guest_ok(f'realpath {self.virtio_device()}').strip()
        path = os.path.dirname(path)
        # The legacy interface is larger with MSI-X.  The directory may also
        # be there, but empty.
        _, vectors = self.run_in_guest(f'ls {path}/msi_irqs 2>/dev/null')
        return path + '/resource0', 6 if vectors.strip() else 5

    def guest_config(self):
        '''
        The configuration space as the guest sees it: a list of numbers, whose
        length is that of the configuration space.
        '''
        bar, start = self.guest_bar()
        out = self.guest_ok(
            f'for i in $(seq {start} {start + 4}); do'
            f' dd if={bar} bs=4 skip=$i count=1 2>/dev/null | od -An -tx4;'
            ' done')
        # There may be nothing behind it in the BAR, or all ones.
        words = (out + ' ffffffff').split()
        return [int(word, 16) for word in words[:words.index('ffffffff')]]

    def guest_poison(self):
        '''
        Have the driver fill free pages with something that is not zero.

        Debian's kernels are built without CONFIG_PAGE_POISONING, so that the
        driver can negotiate the feature (with init_on_free), but the pages
        are zero.  In this case, write to the configuration space what the
        driver would have written.
        '''
        self.require_feature(F_PAGE_POISON, 'page poisoning')
        if self.guest_config()[3] != PAGE_POISON:
            self.write_poison(PAGE_POISON)

    def write_poison(self, value):
        '''Write poison_val to the configuration space.'''
        data = ''.join(f'\\{byte:03o}' for byte in
                       value.to_bytes(4, 'little'))
        bar, start = self.guest_bar()
        # Reading refreshes the other fields, which are written, too
        self.guest_config()
        self.guest_ok(f"printf '{data}' | dd of={bar} bs=4 count=1"
                      f' seek={start + 3} conv=notrunc')
        self.assertEqual(self.guest_config()[3], value)

    def meminfo(self):
        '''/proc/meminfo in bytes'''
        out = self.guest_ok('cat /proc/meminfo')
        return {key: int(value) * 1024 for key, value in
                re.findall(r'^(\S+):\s+(\d+) kB$', out, re.MULTILINE)}

    def fall_asleep(self):
        '''
        Suspend the guest to RAM.  It prints "is awake" and the exit code when
        it has woken up.
        '''
        self.vm.get_qmp_events()
        self.vm.console_socket.sendall(
            b'echo mem > /sys/power/state; echo "is ""awake" $?\n')
        self.assertIsNotNone(self.vm.event_wait('SUSPEND',
                                                timeout=self.timeout))
        self.wait_for(lambda: self.vm.cmd('query-status')['status']
                      == 'suspended', 'the guest to sleep')

    def set_polling(self, interval):
        '''Set the interval at which the device asks for statistics.'''
        self.vm.cmd('qom-set', path=self.BALLOON,
                    property='guest-stats-polling-interval', value=interval)

    def host_stats(self):
        '''The statistics that were provided, and the time of the update'''
        stats = self.host_property('guest-stats')
        return ({name: value for name, value in stats['stats'].items()
                 if value != UNSET_STATS_VALUE}, stats['last-update'])

    def wait_for_stats(self, updates=2):
        '''Wait for several updates; return the last statistics.'''
        seen = {self.host_stats()[1]}

        def updated():
            stats, when = self.host_stats()
            seen.add(when)
            return stats if len(seen) > updates else None

        return self.wait_for(updated, 'statistics')

    def vm_status(self, name):
        '''A value in bytes from /proc/PID/status of QEMU, like "VmHWM"'''
        with open(f'/proc/{self.vm.get_pid()}/status',
                  encoding='ascii') as status:
            for line in status:
                if line.startswith(name + ':'):
                    return int(line.split()[1]) * 1024
        return 0


class OlderQemu(QEMUMachine):
    '''A QEMU before 11.1, which has no objects that are monitors'''

    @property
    def _harness_args(self):
        args = super()._harness_args
        if '-object' in args:
            args[args.index('-object'):] = ['-mon', 'chardev=mon,mode=control']
        return args


class BalloonMigrationTest(BalloonLinuxTest):
    '''
    Several QEMUs; self.vm is the one in which the guest runs.

    BALLOON_QEMU_C, BALLOON_QEMU_RUST and BALLOON_STOCK_QEMU are the paths of
    the executables.
    '''

    # The most recent one that the QEMU 7.2 in Debian 12 also knows
    MACHINE = 'pc-i440fx-7.2'

    VARIABLES = {
        'C': 'BALLOON_QEMU_C',
        'Rust': 'BALLOON_QEMU_RUST',
        'stock': 'BALLOON_STOCK_QEMU',
    }

    # The smallest bandwidth.  A part of the stream, which is a few pages if
    # even zero pages are sent as a whole, leaves QEMU every 100 ms: the guest
    # needs minutes to arrive, and does not if the test does something else.
    CRAWL = {'max-bandwidth': 10, 'max-postcopy-bandwidth': 10}

    _current = None
    _count = 0

    @property
    def vm(self):
        return self._current or super().vm

    def setUp(self):
        super().setUp()
        missing = [var for key, var in self.VARIABLES.items()
                   if key != 'stock' and not os.getenv(var)]
        if missing:
            self.skipTest('set ' + ' and '.join(missing))

    def binary(self, impl):
        '''The executable for "C", "Rust" or "stock"; None if not given'''
        return os.getenv(self.VARIABLES[impl])

    def new_qemu(self, impl, options='', cmdline='', args=()):
        '''A QEMU that is not running yet'''
        self._count += 1
        name = f'{self._count}-{impl}'
        machine = OlderQemu if impl == 'stock' else QEMUMachine
        vm = machine(self.binary(impl), name=name, base_temp_dir=self.workdir,
                     log_dir=self.log_file(), qmp_timer=self.timeout)
        # is shut down at the end of the test
        self._vms[name] = vm
        vm.impl = impl
        vm.set_machine(self.MACHINE)
        vm.set_console()
        vm.add_args('-nodefaults',
                    '-accel', 'tcg',
                    '-m', str(self.RAM // MIB),
                    '-kernel', self.kernel,
                    '-initrd', self.initrd,
                    '-append', f'{CMDLINE} {cmdline}',
                    '-object', 'iothread,id=iothread0',
                    '-device',
                    'virtio-balloon-pci,id=balloon0,addr=5' + options,
                    *args)
        return vm

    def boot(self, impl, options='', cmdline='', args=()):
        '''Boot a guest.'''
        # Older versions of QEMU sometimes hang while they boot a recent Linux
        # with TCG.  Do not tolerate this in what is tested.
        attempts = 3 if impl == 'stock' else 1
        for attempt in range(1, attempts + 1):
            self._console = b''
            self._current = self.new_qemu(impl, options, cmdline, args)
            self._current.launch()
            try:
                self.wait_console(rb'Guest is ready', self.timeout // attempts)
                break
            except AssertionError as exc:
                self.log.warning('attempt %d to boot: %s', attempt, exc)
                print(f'# {self.id()}: {impl} QEMU did not boot the guest,'
                      f' attempt {attempt} of {attempts}', file=sys.stderr)
                self._current.shutdown(hard=True)
                if attempt == attempts:
                    raise
        self.prepare_guest()

    @staticmethod
    def capabilities(vm, **names):
        '''Set capabilities for migration.'''
        vm.cmd('migrate-set-capabilities', capabilities=[
            {'capability': name.replace('_', '-'), 'state': state}
            for name, state in names.items()])

    def incoming(self, impl, options='', cmdline='', args=(), **caps):
        '''A QEMU that waits for a guest, and where it does'''
        vm = self.new_qemu(impl, options, cmdline,
                           ('-incoming', 'defer', *args))
        vm.launch()
        uri = f'unix:{self.socket_dir().name}/{self._count}'
        # the source waits for the destination before it says goodbye
        self.capabilities(vm, return_path=True, **caps)
        self.capabilities(self.vm, return_path=True, **caps)
        vm.cmd('migrate-incoming', uri=uri)
        return vm, uri

    def migration(self, vm=None):
        '''The state of the migration'''
        return (vm or self.vm).cmd('query-migrate')

    def wait_migration(self, vm, *states):
        '''Wait for the end of the migration on one side.'''
        def finished():
            status = self.migration(vm).get('status')
            if status in states:
                return status
            self.assertNotIn(status, ('completed', 'failed', 'cancelled'),
                             self.migration(vm).get('error-desc'))
            return None
        return self.wait_for(finished, 'migration')

    def wait_cancelled(self, vm):
        '''Cancel a migration, and wait until it has ended.'''
        self.assertEqual(self.migration(vm)['status'], 'active')
        vm.cmd('migrate_cancel')
        # The thread that sends may find that the other side has gone before
        # it finds out that this is intended.
        self.wait_migration(vm, 'cancelled', 'failed')
        # see crawl()
        vm.cmd('migrate-set-parameters', **{'zero-page-detection': 'multifd'})

    def crawl(self, vm):
        '''Have a migration, which has not begun, take very long.'''
        vm.cmd('migrate-set-parameters',
               **{'zero-page-detection': 'none', 'downtime-limit': 1,
                  **self.CRAWL})

    def switch_to(self, vm):
        '''The guest has arrived in another QEMU.'''
        self.wait_migration(vm, 'completed')
        self.wait_for(lambda: vm.cmd('query-status')['status'] == 'running',
                      'the guest to run')
        old, self._current = self._current, vm
        # Another QEMU, another socket
        self._console = b''
        if old.is_running():
            old.shutdown()
        # A part of a line may have been sent to the old one.
        vm.console_socket.sendall(b'\n')

    def migrate(self, impl, options='', cmdline='', args=(), meanwhile=None):
        '''
        Move the guest; return what query-migrate says at the end.
        If there is something to do meanwhile, hardly anything is transferred
        until that is done.
        '''
        dst, uri = self.incoming(impl, options, cmdline, args)
        src = self.vm
        fast = {'max-bandwidth': 1 << 34, 'downtime-limit': 2000}
        src.cmd('migrate-set-parameters',
                **{**fast, **(self.CRAWL if meanwhile else {})})
        src.cmd('migrate', uri=uri)
        if meanwhile:
            meanwhile()
            self.assertEqual(self.migration(src)['status'], 'active')
            src.cmd('migrate-set-parameters', **fast)
        self.wait_migration(src, 'completed')
        info = self.migration(src)
        self.switch_to(dst)
        return info

    def make_data(self, size=16):
        '''
        Put data that cannot be predicted, in the given number of MiB, where
        the guest cannot drop it; return its checksum.
        '''
        self.guest_ok('mkdir -p /data && mount -t tmpfs data /data'
                      ' && dd if=/dev/urandom of=/data/random bs=1M'
                      f' count={size}')
        return self.checksum()

    def checksum(self):
        '''The checksum of the data'''
        out = self.guest_ok('md5sum /data/random').split()[0]
        self.assertRegex(out, '^[0-9a-f]{32}$')
        return out

    def state(self):
        '''What must not be changed by migration'''
        return {
            'actual': self.actual(),
            'features': self.guest_features(),
            'config': self.guest_config(),
            'checksum': self.checksum(),
        }

    def check_stats(self):
        '''Statistics arrive here, too.'''
        self.set_polling(1)
        stats = self.wait_for_stats()
        self.assertGreaterEqual(len(stats), 10)
        self.assertEqual(stats['stat-total-memory'],
                         self.meminfo()['MemTotal'])

    def check_balloon(self):
        '''The balloon reaches each target, also its previous one.'''
        before = self.actual()
        # MemTotal does not change if deflate-on-oom is on, and MemFree lags
        self.set_balloon(before - 32 * MIB)
        free = self.meminfo()['MemFree']
        self.set_balloon(before + 64 * MIB)
        self.wait_for(lambda: self.meminfo()['MemFree'] > free + 48 * MIB,
                      'the memory to be free')
        self.set_balloon(before)

    def check_oom(self):
        '''The balloon gives way to a process.'''
        before = self.actual()
        self.assertLess(before, self.HOG)
        self.assertEqual(self.use_memory(), 0)
        self.wait_for(lambda: self.actual() > self.HOG, 'deflation')
        _, log = self.run_in_guest('dmesg')
        self.assertNotIn('Out of memory: Killed', log)
        self.set_balloon(before)
