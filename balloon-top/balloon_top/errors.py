# SPDX-License-Identifier: GPL-2.0-or-later
'''What may go wrong with a guest'''

# How long QEMU may take to greet or to answer, in seconds
TIMEOUT = 3


class SourceError(Exception):
    '''There is no connection to the guest, for a reason.'''


class Ended(SourceError):
    '''Nothing is there (any longer).'''


class CommandError(Exception):
    '''QEMU says that it cannot execute a command.'''
