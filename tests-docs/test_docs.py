#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Do what the documents tell
'''
Runs the commands of the documents in a clone of the last commit:

    python3 tests-docs/test_docs.py [NAME ...]

Each block of README.md, CONTRIBUTING.md and docs/install.md that is marked as
"sh" is a test, and so is each command in the table of README.md; without names
all of them are run, in this order.  What they build is in the usual cache, and
what they install in the usual directory.  A line that ends with "# fails" has
to.
'''

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENTS = ['README.md', 'CONTRIBUTING.md', 'docs/install.md']

# The commands of README's table, with arguments
COMMANDS = {
    'build': ['--device c'],
    'path': ['--device c', '--source'],
    'install': [''],
    'uninstall': [''],
    'deb': ['--out packages'],
    'demo': [''],
    # CI runs all suites.
    'test': ['unit'],
    'bench': ['--reps 1 --only memfd --json bench.json --chart bench.svg'],
    'guest-policies': ['--quick --policy oom-notifier-2020 --json policies.json'],
    'series': ['--out series', '--import && git diff --exit-code patches'],
}

# Blocks that are not run as they are, by how they begin
ELSEWHERE = {
    'apt-get install --allow-downgrades': 'cargo xtask test deb',
    'cargo xtask test unit ': 'CI',
}

# What has to be there before a block, by how a line of it begins
BEFORE = {
    # The tree that the series is for, from Debian's tarball, and what that lacks;
    # and bindgen
    'cd ../qemu ': '''
cargo xtask -q build > /dev/null
tree=$(cargo xtask path --source)
git clone -q "$tree" ../qemu
git -C ../qemu checkout -q "$(git -C ../qemu log --format=%H -1 --grep=EDK2)"
cp -rL "$tree"/subprojects/package* ../qemu/subprojects/
export PATH="$(echo "$tree"/../../tools/bindgen-*/bin):$PATH"
export PYTHON="$(echo "$tree"/../../tools/venv-*/bin/python3)"
export GIT_COMMITTER_NAME=tests-docs GIT_COMMITTER_EMAIL=tests@example.org
''',
    'pipx run ': 'command -v pipx > /dev/null || apt-get install -y pipx\n',
}


# What is run in place of a command
INSTEAD = {
    # Debian's tarball has no firmware.
    './configure ': './configure --disable-install-blobs ',
}


def blocks(name, text):
    '''The blocks of a document: their names, and what they do'''
    heading = name
    fence = None
    for line in text.splitlines():
        if fence is not None:
            if line == '```':
                yield f'{name}: {heading}', '\n'.join(fence)
                fence = None
            else:
                fence.append(line)
        elif line == '```sh':
            fence = []
        elif line.startswith('#'):
            heading = line.lstrip('# ')


def expect_failures(script):
    '''Lines that fail, and say so, are as they should be.'''
    return re.sub(r'^(.*\S) +# fails\b.*$',
                  r'if \1; then echo "not failed: \1"; exit 1; fi',
                  script, flags=re.MULTILINE)


def table(text):
    '''The commands in the table'''
    found = set()
    for line in text.splitlines():
        if line.startswith('| `cargo xtask '):
            cell = line.split(' | ')[0]
            found.add(re.match(r'\| `cargo xtask ([\w-]+)', cell)[1])
            found.update(re.findall(r', `([\w-]+)`', cell))
    return found


def collect():
    '''All tests: their names and scripts'''
    tests = []
    for name in DOCUMENTS:
        with open(os.path.join(REPO, name), encoding='utf-8') as file:
            text = file.read()
        for title, script in blocks(name, text):
            if any(script.startswith(start) for start in ELSEWHERE):
                continue
            before = [code for line, code in BEFORE.items()
                      if any(x.startswith(line) for x in script.splitlines())]
            for command, other in INSTEAD.items():
                script = script.replace(command, other)
            tests.append((title, ''.join(before) + expect_failures(script)))
        if name == 'README.md':
            if table(text) != set(COMMANDS):
                sys.exit('COMMANDS are not those of README.md: '
                         f'{sorted(table(text) ^ set(COMMANDS))}')
            tests += [(f'cargo xtask {command} {args}'.strip(),
                       f'cargo xtask -q {command} {args}')
                      for command, variants in COMMANDS.items()
                      for args in variants]
    return tests


def run(name, script, clone):
    '''Run a test; return whether it has passed.'''
    print(f'--- {name}', flush=True)
    start = time.monotonic()
    code = subprocess.run(['bash', '-euo', 'pipefail', '-c', script],
                          cwd=clone, stdin=subprocess.DEVNULL,
                          check=False).returncode
    result = 'ok' if code == 0 else f'FAILED ({code})'
    print(f'--- {name}: {result}, {time.monotonic() - start:.0f} s',
          flush=True)
    return code == 0


def main():
    '''Run the tests that are named, or all.'''
    tests = collect()
    names = sys.argv[1:]
    if names:
        tests = [test for test in tests if any(n in test[0] for n in names)]
    # as short and as plain as somebody would have it
    directory = tempfile.mkdtemp(prefix='docs-', dir='/var/tmp')
    clone = os.path.join(directory, 'clone')
    subprocess.run(['git', 'clone', '-q', REPO, clone], check=True)
    results = [run(name, script, clone) for name, script in tests]
    shutil.rmtree(directory)
    print(f'{sum(results)} passed, {results.count(False)} failed')
    return 0 if results and all(results) else 1


if __name__ == '__main__':
    sys.exit(main())
