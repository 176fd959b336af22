# SPDX-License-Identifier: GPL-2.0-or-later
'''What QEMU says about the balloon of a guest'''

import asyncio
import contextlib
import re
import time

from . import model
from .errors import CommandError, Ended, SourceError, TIMEOUT

PARENTS = ['/machine/peripheral', '/machine/peripheral-anon']
DEVICE = re.compile(r'child<virtio-balloon(-[a-z-]+)?>')
POLLING = 'guest-stats-polling-interval'


async def find_device(source):
    '''The path of the balloon: None if there is none'''
    for parent in PARENTS:
        try:
            children = await source.execute('qom-list', path=parent)
        except CommandError:
            continue
        for child in children if isinstance(children, list) else []:
            name = model.mapping(child).get('name')
            kind = model.mapping(child).get('type')
            if isinstance(name, str) and isinstance(kind, str) \
                    and DEVICE.fullmatch(kind):
                return f'{parent}/{name}'
    return None


class Guest:
    '''A guest, with the latest record of it'''

    def __init__(self, source, poll=None):
        self.source = source
        self.record = None
        self._poll = poll
        self._name = model.clean(source.name)
        # Whether there is a connection, and whether there has been one
        self._attached = False
        self._seen = False
        self._device = None
        self._previous = None
        # The device whose interval this program has changed, and the old one
        self._changed = None
        self._task = None
        self._since = None

    def _blank(self, error):
        return model.blank(self._name, model.clean(self.source.path),
                           time.time(), model.clean(error))

    async def _get(self, name):
        '''A property of the device: None if it has none'''
        try:
            return await self.source.execute(
                'qom-get', path=self._device, property=name)
        except CommandError:
            return None

    async def _start_polling(self):
        '''Set the interval, unless somebody asks as often.'''
        old = model.number(await self._get(POLLING))
        if old is None or 0 < old <= self._poll:
            return
        # If this task is cancelled, QEMU may do it nevertheless.
        self._changed = self._device, old
        with contextlib.suppress(CommandError):
            await self.source.execute('qom-set', path=self._device,
                                      property=POLLING, value=self._poll)

    async def _restore(self):
        '''Restore the interval, unless somebody else has changed it.'''
        self._device, old = self._changed
        if await self._get(POLLING) == self._poll:
            await self.source.execute('qom-set', path=self._device,
                                      property=POLLING, value=old)

    async def stop(self):
        '''
        Restore the interval, and disconnect.  Return what has failed, if
        anything has.
        '''
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        try:
            async with asyncio.timeout(TIMEOUT):
                if self._changed:
                    await self._restore()
        except (CommandError, SourceError, TimeoutError) as exc:
            if not isinstance(exc, Ended):
                why = str(exc) or 'QEMU does not answer'
                return f'{POLLING} is not restored: {why}'
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT):
                    await self.source.close()
        return None

    async def _attach(self):
        '''Connect, if it is not connected.'''
        await self.source.open()
        if not self._attached and not self.source.knows_name:
            with contextlib.suppress(CommandError):
                reply = await self.source.execute('query-name')
                name = model.string(model.mapping(reply).get('name'))
                self._name = name or self._name
        self._attached = self._seen = True
        if self._device is None:
            self._device = await find_device(self.source)
            if self._device and self._poll is not None:
                await self._start_polling()

    async def _read(self):
        '''Ask QEMU for all that is shown.'''
        replies = {'has-device': self._device is not None,
                   'clock': time.monotonic()}
        if not self._device:
            return replies
        replies['status'] = await self._get('balloon-status')
        if replies['status'] is None:
            replies['polling-interval'] = await self._get(POLLING)
            with contextlib.suppress(CommandError):
                replies['balloon'] = await self.source.execute('query-balloon')
        else:
            replies['counters'] = await self._get('balloon-counters')
            replies['clock'] = time.monotonic()
        replies['guest-stats'] = await self._get('guest-stats')
        if replies['guest-stats'] is None:
            # Both devices have this, so it may have been unplugged.
            self._device = await find_device(self.source)
            replies['has-device'] = self._device is not None
        return replies

    async def _sample(self):
        '''Take a sample.'''
        try:
            await self._attach()
            replies = await self._read()
        # Whatever QEMU says, the other guests are still of interest.
        # pylint: disable-next=broad-exception-caught
        except Exception as exc:
            why = str(exc) if isinstance(exc, SourceError) else repr(exc)
            if isinstance(exc, Ended):
                # The next QEMU there may be another guest.
                self._changed = None
                if self._seen:
                    why = 'has ended'
            self._attached = False
            self._device = self._previous = None
            self.record = self._blank(why)
            return
        self.record = model.record(
            self._name, model.clean(self.source.path), time.time(), replies,
            self._previous)
        self._previous = replies

    def update(self):
        '''
        Start to take a sample, unless that has not ended since the last time.
        Return the task.
        '''
        if self._task is None or self._task.done():
            self._since = time.monotonic()
            self._task = asyncio.create_task(self._sample())
        return self._task

    def current(self):
        '''The latest record'''
        if self._task and not self._task.done():
            seconds = time.monotonic() - self._since
            if self.record is None or seconds >= TIMEOUT:
                return self._blank('QEMU has not answered for '
                                   + model.age_text(seconds))
        return self.record
