# SPDX-License-Identifier: GPL-2.0-or-later
'''Shows the memory balloons of VMs.'''
