# SPDX-License-Identifier: GPL-2.0-or-later
#
# libvirt's daemons, in a place of their own
'''Runs libvirtd and virtlogd so that the system's are not touched.'''

import os
import re
import shutil
import socket
import subprocess
import time
import uuid

# What the daemons would share with those of the system, and where each of ours
# has it below its directory
PRIVATE = {
    'etc': '/etc/libvirt',
    'lib': '/var/lib/libvirt',
    'cache': '/var/cache/libvirt',
    'log': '/var/log/libvirt',
    'run': '/run/libvirt',
}

# libvirtd does not wait for processes that are not its own children, so that
# something else has to be the first process.
#
# udev gives /dev/kvm to the group kvm; where there is no udev, libvirtd, which
# can use KVM when it looks at QEMU, while libvirt-qemu cannot, does not believe
# what it has found out, and looks again for each command.
INIT = '''
if [ -c /dev/kvm ]; then
    cp -a /dev/kvm "$0/kvm"
    chgrp kvm "$0/kvm"
    chmod 660 "$0/kvm"
    mount --bind "$0/kvm" /dev/kvm
fi
for dir in etc lib cache log run; do
    case $dir in etc) to=/etc/libvirt ;; run) to=/run/libvirt ;;
    *) to=/var/$dir/libvirt ;; esac
    mkdir -p "$to"
    mount --bind "$0/$dir" "$to"
done
virtlogd -f /etc/libvirt/virtlogd.conf -p /run/libvirt/virtlogd.pid &
libvirtd -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid &
wait
'''


def wait_for(condition, what, timeout=120.0):
    '''Wait until condition() is true, and return what it returned.'''
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f'still waiting for {what}')
        time.sleep(0.2)


class Daemon:
    '''
    libvirtd with Debian's configuration, in namespaces for mounts and
    processes.  When these end, so do all of its guests.
    '''

    def __init__(self, directory, first_port):
        self.dir = directory
        self.sock_dir = os.path.join(directory, 'sock')
        os.mkdir(directory, 0o755)
        os.mkdir(self.sock_dir, 0o755)
        for name, path in PRIVATE.items():
            if name != 'etc':
                os.mkdir(os.path.join(directory, name), 0o755)
        # Files of guests, and their sockets, which have the same name on all
        # hosts, but are not the same
        self.vm_dir = os.path.join(directory, 'vm')
        self.console_dir = os.path.join(directory, 'run', 'consoles')
        for path in (self.vm_dir, self.console_dir):
            os.mkdir(path)
            os.chmod(path, 0o1777)
        self.configure(first_port)
        self.log = open(os.path.join(directory, 'daemon.log'), 'wb')
        self.process = subprocess.Popen(
            ['unshare', '--mount', '--propagation', 'private',
             '--pid', '--fork', '--kill-child', '--mount-proc',
             'sh', '-ec', INIT, directory],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.uri = ('qemu+unix:///system?socket='
                    + os.path.join(self.sock_dir, 'libvirt-sock'))

    def wait_until_up(self):
        '''Wait until libvirtd answers; it looks at each QEMU first.'''
        wait_for(self.is_up, 'libvirtd')

    def configure(self, first_port):
        '''Debian's configuration, with what has to differ'''
        etc = os.path.join(self.dir, 'etc')
        shutil.copytree('/etc/libvirt', etc)
        # The default network would make a bridge on the host.
        for name in ('networks', 'autostart'):
            shutil.rmtree(os.path.join(etc, 'qemu', name),
                          ignore_errors=True)
        shutil.rmtree(os.path.join(etc, 'nwfilter'), ignore_errors=True)
        with open(os.path.join(etc, 'libvirtd.conf'), 'a') as conf:
            conf.write(f'\nunix_sock_dir = "{self.sock_dir}"\n'
                       # Two daemons on a host do not migrate otherwise
                       f'host_uuid = "{uuid.uuid4()}"\n')
        with open(os.path.join(etc, 'qemu.conf'), 'a') as conf:
            # Those of the host would show guests of ours.  Daemons do not know
            # of each other's ports.
            conf.write('\ncgroup_controllers = []\n'
                       f'remote_display_port_min = {first_port}\n'
                       f'remote_display_port_max = {first_port + 99}\n')

    def is_up(self):
        '''Whether there is an answer'''
        if self.process.poll() is not None:
            with open(self.log.name, errors='replace') as log:
                raise RuntimeError('libvirtd has ended: ' + log.read())
        return self.run('version', check=False).returncode == 0

    def run(self, *args, check=True, timeout=300):
        '''Run virsh.'''
        result = subprocess.run(['virsh', '-q', '-c', self.uri, *args],
                                stdin=subprocess.DEVNULL, text=True,
                                capture_output=True, timeout=timeout,
                                check=False)
        if check and result.returncode != 0:
            raise RuntimeError(f"virsh {' '.join(args)}: {result.stderr}")
        return result

    def virsh(self, *args, **kwargs):
        '''Run virsh, and return what it prints.'''
        return self.run(*args, **kwargs).stdout.strip()

    def numbers(self, *args):
        '''Run virsh, and return lines of a name and a number as a dict.'''
        pairs = re.findall(r'^\s*([\w.-]+)[\s=:]+(\d+)',
                           self.virsh(*args), re.MULTILINE)
        return {name: int(value) for name, value in pairs}

    def inside(self, *command):
        '''Run a command where the guests run.'''
        # unshare's only child
        with open(f'/proc/{self.process.pid}/task/{self.process.pid}/children',
                  encoding='ascii') as children:
            pid = children.read().split()[0]
        return subprocess.run(['nsenter', '-t', pid, '-m', '-p', *command],
                              stdin=subprocess.DEVNULL, text=True,
                              capture_output=True, check=True).stdout

    def console(self, domain):
        '''The serial console of a guest, as seen by its QEMU and by us'''
        name = domain + '.sock'
        return (os.path.join(PRIVATE['run'], 'consoles', name),
                os.path.join(self.console_dir, name))

    def pid(self, domain):
        '''The process of a guest, where it runs'''
        return self.inside('cat', f'/run/libvirt/qemu/{domain}.pid').strip()

    def stop(self):
        '''End the daemon and all of its guests.'''
        # unshare ignores everything else
        self.process.kill()
        self.process.wait()
        self.log.close()


class Console:
    '''The shell of the guest, on its serial console'''

    def __init__(self):
        self.text = b''
        self.sock = None

    def close(self):
        '''Close the connection, if there is one.'''
        if self.sock:
            self.sock.close()
            self.sock = None

    def connect(self, path):
        '''Connect to a QEMU.'''
        self.close()
        self.text = b''

        def attempt():
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(path)
            except OSError:
                sock.close()
                return None
            return sock

        self.sock = wait_for(attempt, path)

    def wait(self, pattern, timeout):
        '''Read until the pattern appears; return the match.'''
        deadline = time.monotonic() + timeout
        while True:
            match = re.search(pattern, self.text)
            if match:
                self.text = self.text[match.end():]
                return match
            self.sock.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                data = self.sock.recv(4096)
            except TimeoutError:
                data = b''
            if not data:
                raise TimeoutError(f'no {pattern} on the console, but: '
                                   + self.text[-2000:].decode(
                                       errors='replace'))
            self.text += data

    def wait_for_shell(self):
        '''Wait for the prompt, which may have been before anybody listened.'''
        def prompt():
            self.sock.sendall(b'\n')
            try:
                return self.wait(rb'guest# ', 2)
            except TimeoutError:
                return None

        wait_for(prompt, 'the guest to boot', 300)
        self.run('stty -echo cols 1000')

    def run(self, command, timeout=120.0):
        '''Run a shell command in the guest; return exit code and output.'''
        self.sock.sendall(
            f'echo "==""begin"; {command}; echo "==""end" $?\n'.encode())
        match = self.wait(rb'==begin\r?\n(?s:(.*?))==end (\d+)\r?\n', timeout)
        output = match.group(1).decode(errors='replace').replace('\r', '')
        return int(match.group(2)), output
