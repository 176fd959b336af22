# SPDX-License-Identifier: GPL-2.0-or-later
'''Tests of a guest, with something instead of QEMU'''

import asyncio
import pathlib
import sys
import unittest
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# pylint: disable=wrong-import-position
from balloon_top import guest as module, model  # noqa: E402
from balloon_top.errors import (  # noqa: E402
    CommandError, Ended, SourceError)
from balloon_top.guest import Guest, POLLING  # noqa: E402


class FakeSource:
    '''A QEMU'''

    name = 'web.sock'
    path = '/run/web.sock'
    knows_name = False

    def __init__(self):
        self.is_open = False
        # An exception that opening, or each command, leads to
        self.error = None
        self.children = [{'name': 'type', 'type': 'string'}, None, {},
                         {'name': 'b', 'type': 'child<virtio-balloon-pci>'}]
        self.properties = {
            'balloon-status': {'actual': 5, 'summary': 'good'},
            'balloon-counters': {}, 'guest-stats': {}, POLLING: 0}
        self.guest_name = {'name': 'web'}
        # If it is not set, QEMU does not answer.
        self.answers = asyncio.Event()
        self.answers.set()
        self.log = []

    async def open(self):
        '''Connect.'''
        if self.error:
            raise self.error
        self.is_open = True

    async def close(self):
        '''Disconnect.'''
        self.is_open = False

    async def execute(self, command, **arguments):
        '''Execute a command.'''
        await self.answers.wait()
        if self.error:
            raise self.error
        self.log.append(command)
        if command == 'query-name':
            return self.guest_name
        if command == 'qom-list':
            if arguments['path'].endswith('anon'):
                raise CommandError('no such path')
            return self.children
        if command == 'query-balloon':
            return {'actual': 7}
        name = arguments['property']
        if command == 'qom-set':
            self.properties[name] = arguments['value']
            return {}
        if name not in self.properties or len(self.children) < 4:
            raise CommandError('no such property')
        return self.properties[name]


class Guests(unittest.IsolatedAsyncioTestCase):
    '''A guest'''

    def setUp(self):
        self.source = FakeSource()
        self.guest = Guest(self.source)

    async def sample(self, guest=None):
        '''Take a sample.'''
        guest = guest or self.guest
        await guest.update()
        return guest.current()

    async def test_sample(self):
        '''The first sample'''
        rec = await self.sample()
        self.assertEqual((rec['guest'], rec['source'], rec['actual'],
                          rec['summary'], rec['error']),
                         ('web', '/run/web.sock', 5, 'good', None))
        self.assertNotIn('qom-set', self.source.log)
        self.assertIsNone(await self.guest.stop())
        self.assertFalse(self.source.is_open)

    async def test_odd_names(self):
        '''The name of a guest may be absent or harmful.'''
        for name, shown in [({}, 'web.sock'), ([], 'web.sock'),
                            ({'name': 3}, 'web.sock'),
                            ({'name': '\x1b[2J'}, '?[2J')]:
            self.source.guest_name = name
            rec = await self.sample(Guest(self.source))
            self.assertEqual(rec['guest'], shown)

    async def test_c_device(self):
        '''A device without details'''
        del self.source.properties['balloon-status']
        rec = await self.sample()
        self.assertEqual((rec['device'], rec['actual']), ('C', 7))
        self.assertEqual(rec['polling-interval'], 0)

    async def test_unplug(self):
        '''A balloon that is unplugged, and plugged again'''
        await self.sample()
        child = self.source.children.pop()
        self.assertEqual((await self.sample())['summary'], model.NO_BALLOON)
        self.source.children.append(child)
        self.assertEqual((await self.sample())['summary'], 'good')

    async def test_ends(self):
        '''A guest that ends, and starts again'''
        self.source.error = Ended('not there')
        self.assertEqual((await self.sample())['error'], 'not there')
        self.source.error = None
        await self.sample()
        self.source.error = Ended('not there')
        rec = await self.sample()
        self.assertEqual((rec['guest'], rec['error']), ('web', 'has ended'))
        self.source.error = None
        self.source.guest_name = {'name': 'db'}
        rec = await self.sample()
        self.assertEqual((rec['guest'], rec['error']), ('db', None))

    async def test_errors(self):
        '''No exception ends the program.'''
        for error in SourceError('bad\n'), RuntimeError('odd'):
            self.source.error = error
            rec = await self.sample()
            self.assertIsNotNone(rec['error'])
            self.assertTrue(rec['error'].isprintable())

    async def test_slow(self):
        '''A guest that does not answer'''
        await self.sample()
        self.source.answers.clear()
        task = self.guest.update()
        self.assertIs(self.guest.update(), task)
        self.assertEqual(self.guest.current()['actual'], 5)
        with mock.patch.object(module, 'TIMEOUT', 0):
            self.assertIn('has not answered', self.guest.current()['error'])
        self.source.answers.set()
        await task
        self.assertIsNone(self.guest.current()['error'])

    async def test_poll(self):
        '''The interval is set, and restored.'''
        guest = Guest(self.source, poll=3)
        await self.sample(guest)
        self.assertEqual(self.source.properties[POLLING], 3)
        await guest.stop()
        self.assertEqual(self.source.properties[POLLING], 0)

    async def test_poll_slower(self):
        '''An interval that is longer is shortened, and restored.'''
        self.source.properties[POLLING] = 60
        guest = Guest(self.source, poll=3)
        await self.sample(guest)
        self.assertEqual(self.source.properties[POLLING], 3)
        await guest.stop()
        self.assertEqual(self.source.properties[POLLING], 60)

    async def test_poll_unneeded(self):
        '''Somebody polls more often, or changes the interval.'''
        self.source.properties[POLLING] = 1
        guest = Guest(self.source, poll=3)
        await self.sample(guest)
        await guest.stop()
        self.assertEqual(self.source.properties[POLLING], 1)
        self.source.properties[POLLING] = 0
        guest = Guest(self.source, poll=3)
        await self.sample(guest)
        self.source.properties[POLLING] = 5
        await guest.stop()
        self.assertEqual(self.source.properties[POLLING], 5)

    async def test_poll_lost(self):
        '''What cannot be restored is reported, unless the guest has ended.'''
        for error, is_reported in [(SourceError('x'), True),
                                   (TimeoutError(), True),
                                   # The device has been unplugged.
                                   (CommandError('x'), False),
                                   (Ended('x'), False)]:
            source = FakeSource()
            guest = Guest(source, poll=3)
            await self.sample(guest)
            source.error = error
            self.assertEqual(await guest.stop() is not None, is_reported)


if __name__ == '__main__':
    unittest.main()
