#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# libvirt with the installed QEMU
'''
Drives guests with libvirt as its users do, with virt-install and virsh.

The environment names the files: BALLOON_EMULATOR is QEMU,
BALLOON_STOCK_QEMU that of Debian, BALLOON_GUEST_KERNEL and
BALLOON_GUEST_INITRD the guest, BALLOON_DOMAIN the domain and BALLOON_APPARMOR
the commands that cargo xtask install prints, and BALLOON_JUNIT where the
results go.
'''

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree as ET

from compare import Comparison
from host import Console, Daemon, wait_for

EMULATOR = os.environ['BALLOON_EMULATOR']
STOCK = os.environ['BALLOON_STOCK_QEMU']

KIB_PER_MIB = 1024
RAM = 512
# What the guest is left with when the balloon is inflated
TARGET = 160
# What a process wants to have then
HOG = 250

# Debian's QEMU and ours have it
MACHINE = 'pc-i440fx-7.2'


class LibvirtTest(unittest.TestCase):
    '''Two daemons, between which guests can migrate'''

    @classmethod
    def setUpClass(cls):
        # below a directory that libvirt-qemu can enter
        cls.dir = tempfile.mkdtemp(prefix='balloon-', dir='/var/tmp')
        cls.addClassCleanup(shutil.rmtree, cls.dir)
        os.chmod(cls.dir, 0o755)
        cls.hosts = []
        for name, first_port in (('a', 5900), ('b', 6900)):
            daemon = Daemon(os.path.join(cls.dir, name), first_port)
            cls.addClassCleanup(daemon.stop)
            cls.hosts.append(daemon)
        # They start at the same time.
        for daemon in cls.hosts:
            daemon.wait_until_up()
        cls.files = {}
        for name in ('kernel', 'initrd'):
            cls.files[name] = os.path.join(cls.dir, name)
            shutil.copy(os.environ[f'BALLOON_GUEST_{name.upper()}'],
                        cls.files[name])

    def setUp(self):
        self.host, self.other = self.hosts
        self.name = self.id().rsplit('.', maxsplit=1)[-1].replace('_', '-')
        self.console = Console()
        self.addCleanup(self.console.close)

    def install(self, emulator=EMULATOR):
        '''Make a guest with virt-install, and wait until it has booted.'''
        disk = os.path.join(self.host.vm_dir, self.name + '.qcow2')
        subprocess.run([os.path.join(os.path.dirname(EMULATOR), 'qemu-img'),
                        'create', '-q', '-f', 'qcow2', disk, '64M'],
                       check=True)
        path, _ = self.host.console(self.name)
        subprocess.run(
            ['virt-install', '--connect', self.host.uri, '--quiet',
             '--name', self.name, '--import', '--noautoconsole',
             '--osinfo', 'detect=off,require=off',
             '--virt-type', 'qemu', '--machine', MACHINE,
             '--memory', str(RAM), '--vcpus', '1',
             '--boot', f"emulator={emulator},kernel={self.files['kernel']},"
             f"initrd={self.files['initrd']},"
             'kernel_args=console=ttyS0 loglevel=1 panic=-1',
             '--disk', f'path={disk},bus=virtio',
             '--network', 'user,model=virtio',
             '--graphics', 'vnc',
             '--serial', f'unix,mode=bind,path={path}',
             '--memballoon', 'model=virtio,autodeflate=on,'
             'freePageReporting=on,stats.period=1'],
            stdin=subprocess.DEVNULL, check=True, timeout=300)
        self.addCleanup(self.remove)
        self.console.connect(self.host.console(self.name)[1])
        self.console.wait_for_shell()

    def remove(self):
        '''Remove the guest, wherever it is.'''
        for host in self.hosts:
            host.run('destroy', self.name, check=False)
            host.run('undefine', '--managed-save', self.name, check=False)

    def virsh(self, *args):
        '''Run virsh where the guest is.'''
        return self.host.virsh(*args)

    def actual(self):
        '''The memory that the guest has, in KiB'''
        return self.host.numbers('dommemstat', self.name)['actual']

    def set_memory(self, mib):
        '''Change the memory of the guest, and wait until it has it.'''
        self.virsh('setmem', self.name, f'{mib}M', '--live')
        wait_for(lambda: self.actual() == mib * KIB_PER_MIB,
                 f'the guest to have {mib} MiB')

    def check_guest(self, mib):
        '''The guest runs, and its balloon is as large as it was.'''
        self.assertEqual(self.virsh('domstate', self.name), 'running')
        self.console.connect(self.host.console(self.name)[1])
        self.assertEqual(self.console.run('cat /proc/uptime')[0], 0)
        self.assertEqual(self.actual(), mib * KIB_PER_MIB)
        self.set_memory(mib + 64)

    def check_process(self, name):
        '''QEMU has as few rights as Debian's configuration gives it.'''
        status = self.host.inside(
            'cat', f'/proc/{self.host.pid(name)}/status')
        uid = int(re.search(r'^Uid:\t(\d+)', status, re.MULTILINE)[1])
        with open('/etc/passwd', encoding='utf-8') as passwd:
            users = {int(line.split(':')[2]): line.split(':')[0]
                     for line in passwd}
        self.assertEqual(users[uid], 'libvirt-qemu')
        self.assertRegex(status, r'(?m)^Seccomp:\t2$')

    def check_vnc(self, name):
        '''There is a VNC server.'''
        number = int(self.virsh('vncdisplay', name).rsplit(':', 1)[1])
        with socket.create_connection(('127.0.0.1', 5900 + number)) as sock:
            self.assertEqual(sock.recv(4), b'RFB ')

    def test_process(self):
        '''The user, the sandbox, VNC and the network of a guest'''
        self.install()
        self.check_process(self.name)
        self.check_vnc(self.name)
        network = self.virsh('qemu-monitor-command', '--hmp', self.name,
                             'info network')
        self.assertIn('type=user', network)

    def test_printed_domain(self):
        '''The domain that cargo xtask install prints'''
        with open(os.environ['BALLOON_DOMAIN'], encoding='utf-8') as file:
            domain = ET.fromstring(file.read())
        self.name = domain.findtext('name')
        path = os.path.join(self.dir, 'printed.xml')
        ET.ElementTree(domain).write(path)
        self.virsh('define', '--validate', path)
        self.addCleanup(self.remove)
        self.virsh('start', self.name)
        self.check_process(self.name)
        self.check_vnc(self.name)

    def test_statistics(self):
        '''setmem, dommemstat, domstats'''
        self.install()
        self.set_memory(TARGET)
        stats = wait_for(self.all_statistics, 'statistics of the guest')
        self.assertLess(stats['unused'], stats['available'])
        self.assertLess(stats['available'], RAM * KIB_PER_MIB)
        # from BALLOON_CHANGE, of which there is one a second at most
        wait_for(lambda: self.balloon_statistics()['balloon.current']
                 == TARGET * KIB_PER_MIB, 'domstats')
        self.assertEqual(self.balloon_statistics()['balloon.maximum'],
                         RAM * KIB_PER_MIB)
        self.set_memory(RAM)

    def balloon_statistics(self):
        '''What domstats prints'''
        return self.host.numbers('domstats', '--balloon', self.name)

    def all_statistics(self):
        '''What dommemstat prints, when the guest has sent something'''
        stats = self.host.numbers('dommemstat', self.name)
        return stats if stats.get('last_update') else None

    def test_event(self):
        '''balloon-change'''
        self.install()
        with subprocess.Popen(
                ['virsh', '-q', '-c', self.host.uri, 'event', self.name,
                 '--event', 'balloon-change', '--timeout', '60'],
                stdout=subprocess.PIPE, text=True) as events:
            # It does not tell when it listens.
            time.sleep(1)
            self.set_memory(TARGET)
            line = events.stdout.readline()
            events.terminate()
        self.assertIn("event 'balloon-change'", line)
        self.assertIn(self.name, line)

    def test_managed_save(self):
        '''managedsave and start'''
        self.install()
        self.set_memory(TARGET)
        self.virsh('managedsave', self.name)
        self.assertEqual(self.virsh('domstate', self.name), 'shut off')
        self.virsh('start', self.name)
        self.check_guest(TARGET)

    def test_live_migration(self):
        '''To another daemon and back'''
        self.install()
        self.set_memory(TARGET)
        for _ in range(2):
            self.virsh('migrate', '--live', '--undefinesource', '--persistent',
                       '--unsafe', self.name, self.other.uri,
                       '--migrateuri', 'tcp://127.0.0.1')
            self.host, self.other = self.other, self.host
            self.check_guest(TARGET)
            self.set_memory(TARGET)

    def test_tls_migration(self):
        '''Over TLS, with a certificate of each daemon'''
        make_certificates('/etc/pki/qemu')
        self.install()
        self.set_memory(TARGET)
        migrate = ['migrate', '--live', '--undefinesource', '--persistent',
                   '--unsafe', '--tls', self.name, self.other.uri,
                   '--migrateuri', 'tcp://127.0.0.1']
        # The certificate has a name.  Either end can be the first to complain.
        with self.assertRaises(RuntimeError):
            self.virsh(*migrate, '--tls-destination', 'elsewhere')
        self.assertEqual(self.virsh('domstate', self.name), 'running')
        self.virsh(*migrate, '--tls-destination', 'balloon.test')
        self.host, self.other = self.other, self.host
        self.check_guest(TARGET)

    def test_stock_qemu(self):
        '''Saved with Debian's QEMU, restored with ours, and back'''
        self.install(STOCK)
        self.set_memory(TARGET)
        saved = os.path.join(self.host.vm_dir, self.name + '.saved')
        for emulator in (EMULATOR, STOCK):
            self.virsh('save', self.name, saved)
            domain = ET.fromstring(self.virsh('save-image-dumpxml', saved,
                                              '--security-info'))
            domain.find('devices/emulator').text = emulator
            path = os.path.join(self.dir, 'restore.xml')
            ET.ElementTree(domain).write(path)
            self.virsh('restore', saved, '--xml', path)
            running = ET.fromstring(self.virsh('dumpxml', self.name))
            self.assertEqual(running.findtext('devices/emulator'), emulator)
            self.check_guest(TARGET)
            self.set_memory(TARGET)

    def test_out_of_memory(self):
        '''autodeflate'''
        self.install()
        self.set_memory(TARGET)
        code, _ = self.console.run(
            f'dd if=/dev/zero of=/dev/null bs={HOG}M count=1')
        self.assertEqual(code, 0)
        wait_for(lambda: self.actual() > HOG * KIB_PER_MIB, 'deflation')
        _, log = self.console.run('dmesg')
        self.assertNotIn('Out of memory', log)

    def test_apparmor(self):
        '''The rules that cargo xtask install prints are in the profiles.'''
        with open(os.environ['BALLOON_APPARMOR'], encoding='utf-8') as file:
            # There is no AppArmor to be reloaded.
            commands = file.read().replace('systemctl reload', ': systemctl')
        subprocess.run(['sh', '-ec', commands], check=True)
        guest = os.path.join(self.dir, 'profile')
        with open(guest, 'w', encoding='utf-8') as file:
            file.write('include <tunables/global>\n'
                       'profile libvirt-x {\n'
                       '  include <abstractions/libvirt-qemu>\n}\n')
        for profile, rule in (('/etc/apparmor.d/usr.sbin.libvirtd', 'PUx'),
                              (guest, 'rmix')):
            text = parse_profile('--preprocess', profile)
            self.assertIn(f'{os.path.dirname(EMULATOR)}/* {rule},', text)
            parse_profile('--skip-kernel-load', profile)

    def test_options(self):
        '''What Debian's QEMU has, and what ours has'''
        comparison = Comparison(EMULATOR, STOCK)
        self.assertEqual(comparison.missing_options(), [])

    def test_domains(self):
        '''Domains that start with Debian's QEMU start with ours.'''
        comparison = Comparison(EMULATOR, STOCK)
        self.assertEqual(comparison.failing_domains(self.hosts), [])


def parse_profile(option, profile):
    '''What apparmor_parser makes of a profile'''
    return subprocess.run(
        ['apparmor_parser', '--skip-cache', option, profile],
        check=True, capture_output=True, text=True).stdout


def make_certificates(directory):
    '''Certificates for both ends of a connection'''
    os.makedirs(directory)

    def make(name, subject, *extensions, issuer=()):
        path = os.path.join(directory, name)
        command = ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes',
                   '-days', '2', '-subj', f'/CN={subject}',
                   '-keyout', f'{path}-key.pem', '-out', f'{path}-cert.pem',
                   *issuer]
        for extension in extensions:
            command += ['-addext', extension]
        subprocess.run(command, check=True, capture_output=True)
        # libvirt-qemu reads it.
        os.chmod(f'{path}-key.pem', 0o644)

    make('ca', 'balloon.test CA', 'keyUsage=keyCertSign')
    issuer = ['-CA', os.path.join(directory, 'ca-cert.pem'),
              '-CAkey', os.path.join(directory, 'ca-key.pem')]
    for name in ('server', 'client'):
        make(name, 'balloon.test', 'basicConstraints=critical,CA:FALSE',
             'subjectAltName=DNS:balloon.test',
             'keyUsage=digitalSignature,keyEncipherment',
             f'extendedKeyUsage={name}Auth', issuer=issuer)


class Result(unittest.TextTestResult):
    '''Tells how far it is, in the way that ninja does'''

    total = 0

    def startTest(self, test):
        super().startTest(test)
        print(f'[{self.testsRun}/{self.total}] {test.id()}', flush=True)


def write_junit(path, tests, result):
    '''Write the results.'''
    failed = {test.id() for test, _ in result.failures + result.errors}
    skipped = {test.id() for test, _ in result.skipped}
    suite = ET.Element('testsuite')
    for name in tests:
        case = ET.SubElement(suite, 'testcase', name=name)
        if name in failed:
            ET.SubElement(case, 'failure')
        elif name in skipped:
            ET.SubElement(case, 'skipped')
    # in setUpClass, for example
    for name in failed - set(tests):
        case = ET.SubElement(suite, 'testcase', name=name)
        ET.SubElement(case, 'failure')
    ET.ElementTree(suite).write(path)


def main():
    '''Run the tests that are named, or all.'''
    loader = unittest.defaultTestLoader
    suite = (loader.loadTestsFromNames(sys.argv[1:], sys.modules[__name__])
             if sys.argv[1:] else loader.loadTestsFromTestCase(LibvirtTest))
    # A suite forgets its tests when it has run them.
    names = re.findall(r'testMethod=(\w+)', str(suite))
    tests = [f'{__name__}.LibvirtTest.{name}' for name in names]
    Result.total = len(tests)
    runner = unittest.TextTestRunner(resultclass=Result, verbosity=0)
    result = runner.run(suite)
    write_junit(os.environ['BALLOON_JUNIT'], tests, result)
    return 0 if result.wasSuccessful() else 1


if __name__ == '__main__':
    sys.exit(main())
