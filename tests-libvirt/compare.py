# SPDX-License-Identifier: GPL-2.0-or-later
#
# What libvirt can use of Debian's QEMU, and of the installed one
'''Compares two builds of QEMU.'''

import os
import re
import subprocess
from multiprocessing.pool import ThreadPool

from domains import DOMAINS, domain_xml

# Each is also in docs/install.md.
REMOVED = 'QEMU has removed it since'
DESKTOP = 'for desktops; there is -- --enable-...'

# What Debian's QEMU has, and ours need not have
MISSING_OPTIONS = {
    'device pvrdma': REMOVED,
    'device sga': REMOVED,
    'block driver gluster': REMOVED,
    'display gtk': DESKTOP,
    'display sdl': DESKTOP,
    'audiodev jack': DESKTOP,
    'audiodev pa': DESKTOP,
    'audiodev sdl': DESKTOP,
    'audiodev sndio': 'Debian has it no longer either',
}

# Domains that start with Debian's QEMU, and need not start with ours
FAILING_DOMAINS = {
    # With libvirt before 9.1 or so; it takes the removed -no-hpet for the sign
    # that there is an HPET.
    'timers': 'libvirt 9.0 finds no HPET in QEMU 9.0 and later',
}


class Comparison:
    '''Of QEMU with that of Debian'''

    def __init__(self, ours, stock):
        self.ours = ours
        self.stock = stock

    def missing_options(self):
        '''What Debian's QEMU knows by name, and ours does not'''
        missing = options(self.stock) - options(self.ours)
        return sorted(missing - set(MISSING_OPTIONS))

    def failing_domains(self, hosts):
        '''Domains that start only with Debian's QEMU, and why not with ours'''
        # One host for each, at the same time: there are many.
        jobs = zip(hosts, (self.stock, self.ours), (5700, 5800))
        with ThreadPool(len(hosts)) as pool:
            stock, ours = pool.starmap(start_all, jobs)
        failing = []
        for name in DOMAINS:
            if not ours[name]:
                outcome = 'not with Debian\'s QEMU' if stock[name] else 'good'
            elif stock[name]:
                outcome = f'with neither: {ours[name]}'
            else:
                outcome = f'only with Debian\'s QEMU: {ours[name]}'
                if name not in FAILING_DOMAINS:
                    failing.append(f'{name}: {ours[name]}')
            print(f'# {name}: {outcome}')
        return failing


def help_text(*command):
    '''What a program prints.'''
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False,
                          capture_output=True, text=True).stdout


def options(qemu):
    '''Devices, objects and backends of a QEMU'''
    found = set()
    text = help_text(qemu, '-device', 'help')
    for name in re.findall(r'(?:name|alias) "([^"]+)"', text):
        found.add(f'device {name}')
    # a title, a name in each line, and perhaps an empty line and a text
    for kind in ('object', 'netdev', 'chardev', 'display', 'audiodev'):
        text = help_text(qemu, f'-{kind}', 'help').split('\n\n')[0]
        for name in re.findall(r'^ *([\w-]+)$', text, re.MULTILINE):
            found.add(f'{kind} {name}')
    text = help_text(qemu, '-drive', 'format=help').splitlines()[0]
    for name in text.split(':')[1].split():
        found.add(f'block driver {name}')
    return found


def start_all(host, emulator, port):
    '''Start each domain; return a dict of the errors.'''
    return {name: start(host, name, emulator, port) for name in DOMAINS}


def start(host, name, emulator, port):
    '''Start a domain; return the error, if there is one.'''
    path = os.path.join(host.vm_dir, 'compared.xml')
    with open(path, 'w', encoding='utf-8') as file:
        file.write(domain_xml(name, emulator, host.vm_dir, port))
    result = host.run('create', '--paused', path, check=False)
    if result.returncode == 0:
        host.virsh('destroy', 'compared')
        return None
    lines = [line for line in result.stderr.splitlines() if line]
    # libvirt's message is followed by QEMU's.
    return ' '.join(lines[1:])[-300:] or ' '.join(lines)
