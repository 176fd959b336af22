# SPDX-License-Identifier: GPL-2.0-or-later
'''Tests of what is made of the replies of QEMU'''

import json
import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# pylint: disable=wrong-import-position
from balloon_top import model  # noqa: E402
from balloon_top.model import MIB, UNSET  # noqa: E402

STATUS = {
    'summary': 'the balloon has the size that was asked for',
    'driver': 'ready', 'features': ['guest-stats'], 'target': 256 * MIB,
    'shown-target': 256 * MIB, 'actual': 256 * MIB,
    'statistics': {'state': 'answered', 'last-update': 1000,
                   'polling-interval': 2},
    'inhibited-by': [], 'waiting-for-memory': False,
}
COUNTERS = {'pages-inflated': 1000, 'pages-deflated': 0,
            'bytes-reported': 0, 'pages-deflated-unasked': 512}
STATS = {'last-update': 1000, 'stats': {'stat-free-memory': 10 * MIB,
                                        'stat-available-memory': UNSET}}

# What may be instead of anything
ODD = [None, True, -1, 1 << 64, 1 << 200, 1.5, float('nan'), 'x', '\x1b[2J',
       [], {}, [None], {'': []}, [[[]]]]


def replies(**changes):
    '''What QEMU says'''
    return {'has-device': True, 'clock': 10.0, 'status': STATUS,
            'counters': COUNTERS, 'guest-stats': STATS, **changes}


def record(new, previous=None):
    '''A record of a guest'''
    return model.record('web', '/run/web', 1003.0, new, previous)


def variants(value):
    '''Each value with one part of it being odd or absent'''
    yield from ODD
    if isinstance(value, dict):
        for key, old in value.items():
            yield {k: v for k, v in value.items() if k != key}
            for new in variants(old):
                yield {**value, key: new}


class Records(unittest.TestCase):
    '''Replies of QEMU'''

    def test_rust(self):
        '''All that the Rust device has'''
        new = replies(clock=12.0, counters={
            **COUNTERS, 'pages-inflated': 1512, 'bytes-reported': 4 * MIB})
        rec = record(new, replies())
        self.assertEqual(rec['device'], 'Rust')
        self.assertEqual(rec['inflate-rate'], MIB)
        self.assertEqual(rec['deflate-rate'], 0)
        self.assertEqual(rec['report-rate'], 2 * MIB)
        self.assertEqual(rec['unasked'], 2 * MIB)
        self.assertEqual(rec['last-update'], 1000)
        self.assertIsNone(rec['available'])
        self.assertEqual(
            model.cells(rec),
            ['256', '256', '10', '-', '3 s', '1.0', '0.0', '2.0', '2'])

    def test_no_rate(self):
        '''Rates that are not known'''
        more = replies(counters={**COUNTERS, 'pages-inflated': 2000})
        for new, old in [(replies(), None), (replies(), replies()),
                         (replies(clock=11.0), more),
                         (replies(clock=11.0), {'clock': 10.0})]:
            self.assertIsNone(record(new, old)['inflate-rate'])

    def test_never_sent(self):
        '''0 is not a time at which statistics were sent.'''
        rec = record(replies(**{'guest-stats': {**STATS, 'last-update': 0}}))
        self.assertIsNone(rec['free'])
        self.assertIsNone(rec['last-update'])

    def test_c(self):
        '''The C device'''
        rec = record({'has-device': True, 'clock': 1.0, 'status': None,
                      'balloon': {'actual': MIB}, 'polling-interval': 0})
        self.assertEqual((rec['device'], rec['actual'], rec['target']),
                         ('C', MIB, None))
        self.assertEqual(rec['summary'], model.C_DEVICE)
        self.assertIn('web', model.hint([rec]))

    def test_no_device(self):
        '''No balloon'''
        rec = record({'has-device': False, 'clock': 1.0})
        self.assertEqual(rec['summary'], model.NO_BALLOON)
        self.assertIsNone(model.hint([rec]))

    def test_odd(self):
        '''Nothing that QEMU may say leads to an exception.'''
        good = replies(balloon={'actual': 1}, **{'polling-interval': 1})
        del good['clock'], good['has-device']
        count = 0
        for odd in variants(good):
            if not isinstance(odd, dict):
                continue
            new = {**odd, 'clock': 11.0, 'has-device': True}
            for pair in (new, replies()), (replies(clock=12.0), new):
                rec = record(*pair)
                self.assertEqual(rec.keys(), model.blank('', '', 0).keys())
                for text in [*model.cells(rec), rec['summary'] or '']:
                    self.assertTrue(text.isprintable(), text)
                self.assertTrue(json.dumps(rec, allow_nan=False)
                                .isprintable())
                for key in model.SORT_KEYS:
                    self.assertEqual(len(model.sort([rec, rec], key)), 2)
                count += 1
        self.assertGreater(count, 500)


class Texts(unittest.TestCase):
    '''Numbers and strings'''

    def test_clean(self):
        '''Strings have no control characters.'''
        for bad in ['a\x1b[2Jb', 'a\nb', 'a\x9bb', 'a\u202eb', 'a\udc80b',
                    'a\u2028b', 'a\0b']:
            text = model.clean(bad)
            self.assertTrue(text.isprintable())
            self.assertEqual((text[0], text[1], text[-1]), ('a', '?', 'b'))
        self.assertEqual(model.clean('Bücher 1'), 'Bücher 1')
        self.assertLess(len(model.clean('x' * 10000)), 300)

    def test_number(self):
        '''Only unsigned 64-bit numbers are numbers.'''
        self.assertEqual(model.number(UNSET - 1), UNSET - 1)
        self.assertEqual(model.number(0), 0)
        for odd in [UNSET, *ODD]:
            self.assertIsNone(model.number(odd))

    def test_sizes(self):
        '''Sizes and rates'''
        self.assertEqual(model.size_text(None), '-')
        self.assertEqual(model.size_text(1536 * MIB), '1536')
        self.assertEqual(model.size_text(UNSET - 1), str(1 << 44))
        self.assertEqual(model.rate_text(MIB // 2), '0.5')

    def test_age(self):
        '''Times'''
        for seconds, text in [(None, '-'), (-5, '0 s'), (119, '119 s'),
                              (120, '2 min'), (7200, '2 h'),
                              (86400 * 6, '6 d'), (1e15, 'long')]:
            self.assertEqual(model.age_text(seconds), text)

    def test_names(self):
        '''Names of sockets'''
        self.assertEqual(
            model.names(['/a/x', '/b/x', 'y', 'y', '/c/z']),
            [('/a/x', '/a/x'), ('/b/x', '/b/x'), ('y', 'y'), ('/c/z', 'z')])


class Lists(unittest.TestCase):
    '''More than one guest'''

    def setUp(self):
        self.records = [
            {**model.blank(name, '/' + name, 0), 'actual': actual}
            for name, actual in [('c', 1), ('a', None), ('b', 2), ('d', 0)]]

    def order(self, key):
        '''The names in order'''
        return ''.join(rec['guest'] for rec in model.sort(self.records, key))

    def test_sort(self):
        '''Unknown numbers are last.'''
        self.assertEqual(self.order('guest'), 'abcd')
        self.assertEqual(self.order('actual'), 'bcda')

    def test_find(self):
        '''A guest has a name, and a source.'''
        self.assertEqual(model.find(self.records, 'b'), 2)
        self.assertEqual(model.find(self.records, '/d'), 3)
        self.assertIsNone(model.find(self.records, 'e'))


if __name__ == '__main__':
    unittest.main()
