# SPDX-License-Identifier: GPL-2.0-or-later
#
# Linux guests with a memory balloon that migrate between QEMUs
'''Base classes for tests that need more than a booted guest'''

import contextlib
import os
import re
import sys

from qemu.machine import QEMUMachine

from virtio_balloon_guest import BalloonGuestTest, MIB, UNSET_STATS_VALUE

# Feature bits
F_STATS_VQ = 1
F_DEFLATE_ON_OOM = 2
F_FREE_PAGE_HINT = 3
F_PAGE_POISON = 4
F_REPORTING = 5

# The value of free_page_hint_cmd_id after a round
CMD_ID_STOP = 0
CMD_ID_DONE = 1

# The value with which Linux fills free pages, and which it tells the device
PAGE_POISON = 0xaaaaaaaa

# page_poison needs CONFIG_PAGE_POISONING, and takes precedence then.  Without
# it, init_on_free suffices to negotiate the feature.
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
        '''A part of a test; TAP has no subtests.'''
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
        # The legacy interface is larger with MSI-X.  The directory can also
        # exist, but be empty.
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
        # After it, the BAR may have no data, or all ones.
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
        # Reading updates the other fields, which are written, too
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
        Suspend the guest to RAM.  When it wakes up, it prints "is awake" and
        the exit code.
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
        '''The statistics that the driver sent, and the time of the update'''
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

    BALLOON_QEMU_C, BALLOON_QEMU_RUST, BALLOON_STOCK_QEMU and
    BALLOON_LATEST_QEMU are the paths of the executables.
    '''

    # The latest machine type of the QEMU 7.2 in Debian 12
    MACHINE = 'pc-i440fx-7.2'

    VARIABLES = {
        'C': 'BALLOON_QEMU_C',
        'Rust': 'BALLOON_QEMU_RUST',
        'stock': 'BALLOON_STOCK_QEMU',
        'latest': 'BALLOON_LATEST_QEMU',
    }

    # The smallest bandwidth.  QEMU sends one buffer of the stream every 100
    # ms, which is a few pages if even zero pages are sent in full.  The
    # migration would take minutes, and is only completed if the test raises
    # the bandwidth.
    CRAWL = {'max-bandwidth': 10, 'max-postcopy-bandwidth': 10}

    _current = None
    _count = 0

    @property
    def vm(self):
        return self._current or super().vm

    def setUp(self):
        super().setUp()
        missing = [self.VARIABLES[impl] for impl in ('C', 'Rust')
                   if not self.binary(impl)]
        if missing:
            self.skipTest('set ' + ' and '.join(missing))

    def binary(self, impl):
        '''
        The executable for "C", "Rust", "stock" or "latest"; None if not given
        '''
        return os.getenv(self.VARIABLES[impl])

    def new_qemu(self, impl, options='', cmdline='', args=()):
        '''A QEMU that is not running yet'''
        self._count += 1
        name = f'{self._count}-{impl}'
        machine = OlderQemu if impl == 'stock' else QEMUMachine
        vm = machine(self.binary(impl), name=name, base_temp_dir=self.workdir,
                     log_dir=self.log_file(), qmp_timer=self.timeout)
        # it is shut down at the end of the test
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
        # with TCG.  Do not tolerate this in the QEMU that is tested.
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
        '''A QEMU that waits for an incoming migration, and its URI'''
        vm = self.new_qemu(impl, options, cmdline,
                           ('-incoming', 'defer', *args))
        vm.launch()
        uri = f'unix:{self.socket_dir().name}/{self._count}'
        # the source waits for the destination before it ends
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
        # The sending thread may notice that the other side is gone before it
        # learns that this is intended.
        self.wait_migration(vm, 'cancelled', 'failed')
        # see crawl()
        vm.cmd('migrate-set-parameters', **{'zero-page-detection': 'multifd'})

    def crawl(self, vm):
        '''Before a migration starts, limit it so that it takes very long.'''
        vm.cmd('migrate-set-parameters',
               **{'zero-page-detection': 'none', 'downtime-limit': 1,
                  **self.CRAWL})

    def switch_to(self, vm):
        '''The guest has arrived in another QEMU.'''
        self.wait_migration(vm, 'completed')
        self.wait_for(lambda: vm.cmd('query-status')['status'] == 'running',
                      'the guest to run')
        old, self._current = self._current, vm
        # The other QEMU has another socket for the console
        self._console = b''
        if old.is_running():
            old.shutdown()
        # The first part of a line may have been printed by the old QEMU.
        vm.console_socket.sendall(b'\n')

    def migrate(self, impl, options='', cmdline='', args=(), meanwhile=None):
        '''
        Migrate the guest; return what query-migrate says at the end.  If there
        is a function to call meanwhile, the migration hardly makes progress
        until it returns.
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
        Write the given number of MiB of random data where the guest cannot
        drop them; return their checksum.
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
        '''The state that migration must not change'''
        return {
            'actual': self.actual(),
            'features': self.guest_features(),
            'config': self.guest_config(),
            'checksum': self.checksum(),
        }

    def check_stats(self):
        '''Statistics also arrive after migration.'''
        self.set_polling(1)
        stats = self.wait_for_stats()
        self.assertGreaterEqual(len(stats), 10)
        self.assertEqual(stats['stat-total-memory'],
                         self.meminfo()['MemTotal'])

    def check_balloon(self):
        '''The balloon reaches each target, and also the previous one.'''
        before = self.actual()
        # MemTotal does not change if deflate-on-oom is on, and MemFree lags
        self.set_balloon(before - 32 * MIB)
        free = self.meminfo()['MemFree']
        self.set_balloon(before + 64 * MIB)
        self.wait_for(lambda: self.meminfo()['MemFree'] > free + 48 * MIB,
                      'the memory to be free')
        self.set_balloon(before)

    def check_oom(self):
        '''The balloon is deflated when a process needs memory.'''
        before = self.actual()
        self.assertLess(before, self.HOG)
        self.assertEqual(self.use_memory(), 0)
        self.wait_for(lambda: self.actual() > self.HOG, 'deflation')
        _, log = self.run_in_guest('dmesg')
        self.assertNotIn('Out of memory: Killed', log)
        self.set_balloon(before)
