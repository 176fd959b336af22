# SPDX-License-Identifier: GPL-2.0-or-later
'''
What is known about a guest: from the replies of QEMU to a record with the
keys of --json, and from there to text.  Nothing here does I/O.

Guests control much of what QEMU says, so each value may be absent, of any
type, or of any size.
'''

import os

MIB = 1 << 20

# The unit of the balloon
PAGE = 4096

# The value of a statistic that the driver did not provide
UNSET = (1 << 64) - 1

NO_BALLOON = 'no balloon device'
C_DEVICE = 'QEMU\'s C device: no details'

# How much of a string is shown
LONGEST = 200


def mapping(value):
    '''A dictionary: an empty one if it is something else'''
    return value if isinstance(value, dict) else {}


def number(value):
    '''An unsigned 64-bit number: None if it is unknown or something else'''
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return value if is_int and 0 <= value < UNSET else None


def clean(text, longest=LONGEST):
    '''
    A string that is safe for terminals: no control characters, no
    characters that change the direction, no parts of surrogate pairs
    '''
    if len(text) > longest:
        text = text[:longest] + '...'
    return ''.join(c if c.isprintable() else '?' for c in text)


def string(value):
    '''A clean string: None if it is something else'''
    return clean(value) if isinstance(value, str) else None


def strings(value):
    '''A list of clean strings: None if it is something else'''
    if not isinstance(value, list):
        return None
    return [clean(item) for item in value[:64] if isinstance(item, str)]


def rate(key, unit, replies, previous):
    '''
    The bytes per second by which a counter of things with "unit" bytes has
    grown between two samples: None if it is unknown, or if the counter has
    started again
    '''
    if previous is None:
        return None
    seconds = replies['clock'] - previous['clock']
    old = number(mapping(previous.get('counters')).get(key))
    new = number(mapping(replies.get('counters')).get(key))
    if seconds <= 0 or old is None or new is None or new < old:
        return None
    return round((new - old) * unit / seconds)


def blank(name, source, time, error=None):
    '''The record of a guest about which nothing is known'''
    return {
        'time': time, 'guest': name, 'source': source, 'error': error,
        'device': None, 'summary': None, 'driver': None, 'features': None,
        'target': None, 'shown-target': None, 'actual': None, 'free': None,
        'available': None, 'statistics': None, 'last-update': None,
        'polling-interval': None, 'inflate-rate': None, 'deflate-rate': None,
        'report-rate': None, 'reported': None, 'unasked': None,
        'inhibited-by': None, 'waiting-for-memory': None,
    }


def record(name, source, time, replies, previous=None):
    '''
    The record of a guest.  "replies" is what QEMU said: "clock" is when, in
    seconds, and the others are None if QEMU does not have them.  "previous"
    is that of the sample before, for the rates.
    '''
    result = blank(name, source, time)
    if not replies.get('has-device'):
        return result | {'summary': NO_BALLOON}

    stats = mapping(replies.get('guest-stats'))
    # 0: the guest has never sent any
    last_update = number(stats.get('last-update')) or None
    if last_update:
        values = mapping(stats.get('stats'))
        result |= {
            'free': number(values.get('stat-free-memory')),
            'available': number(values.get('stat-available-memory')),
            'last-update': last_update,
        }

    if not isinstance(replies.get('status'), dict):
        balloon = mapping(replies.get('balloon'))
        return result | {
            'device': 'C', 'summary': C_DEVICE,
            'actual': number(balloon.get('actual')),
            'polling-interval': number(replies.get('polling-interval')),
        }

    status = replies['status']
    statistics = mapping(status.get('statistics'))
    counters = mapping(replies.get('counters'))
    unasked = number(counters.get('pages-deflated-unasked'))
    waiting = status.get('waiting-for-memory')
    return result | {
        'device': 'Rust',
        'summary': string(status.get('summary')),
        'driver': string(status.get('driver')),
        'features': strings(status.get('features')),
        'target': number(status.get('target')),
        'shown-target': number(status.get('shown-target')),
        'actual': number(status.get('actual')),
        'statistics': string(statistics.get('state')),
        'polling-interval': number(statistics.get('polling-interval')),
        'inflate-rate': rate('pages-inflated', PAGE, replies, previous),
        'deflate-rate': rate('pages-deflated', PAGE, replies, previous),
        'report-rate': rate('bytes-reported', 1, replies, previous),
        'reported': number(counters.get('bytes-reported')),
        'unasked': None if unasked is None else unasked * PAGE,
        'inhibited-by': strings(status.get('inhibited-by')),
        'waiting-for-memory': waiting if isinstance(waiting, bool) else None,
    }


def size_text(value):
    '''Bytes in MiB'''
    return '-' if value is None else f'{value / MIB:.0f}'


def rate_text(value):
    '''Bytes per second in MiB/s'''
    return '-' if value is None else f'{value / MIB:.1f}'


def age_text(seconds):
    '''How long ago something was'''
    if seconds is None:
        return '-'
    # The clock of this host may have been changed.
    seconds = max(0, round(seconds))
    for unit, length in ('s', 1), ('min', 60), ('h', 3600):
        if seconds < 120 * length:
            return f'{seconds // length} {unit}'
    days = seconds // 86400
    return f'{days} d' if days < 1000 else 'long'


def age(rec):
    '''The seconds since the guest has sent its statistics'''
    last = rec['last-update']
    return None if last is None else rec['time'] - last


# The columns before the summary: name for --sort, heading, unit, value, text
COLUMNS = [
    ('target', 'target', 'MiB', lambda rec: rec['target'], size_text),
    ('actual', 'actual', 'MiB', lambda rec: rec['actual'], size_text),
    ('free', 'free', 'MiB', lambda rec: rec['free'], size_text),
    ('available', 'available', 'MiB', lambda rec: rec['available'],
     size_text),
    ('age', 'age', '', age, age_text),
    ('in', 'in', 'MiB/s', lambda rec: rec['inflate-rate'], rate_text),
    ('out', 'out', 'MiB/s', lambda rec: rec['deflate-rate'], rate_text),
    ('reported', 'reported', 'MiB/s', lambda rec: rec['report-rate'],
     rate_text),
    ('unasked', 'unasked', 'MiB', lambda rec: rec['unasked'], size_text),
]

SORT_KEYS = ['guest'] + [column[0] for column in COLUMNS]


def cells(rec):
    '''The texts of the columns'''
    return [text(value(rec)) for _, _, _, value, text in COLUMNS]


def sort(records, key='guest'):
    '''Sort by name, or by a number: the largest first, unknown last.'''
    records = sorted(records, key=lambda rec: (rec['guest'], rec['source']))
    value = {name: get for name, _, _, get, _ in COLUMNS}.get(key)
    if value:
        records.sort(key=lambda rec: -1 if value(rec) is None else value(rec),
                     reverse=True)
    return records


def names(paths):
    '''
    Pairs of paths and names: the name of the file, unless other files in the
    list have the same
    '''
    paths = list(dict.fromkeys(paths))
    short = [os.path.basename(path) for path in paths]
    return [(path, name if short.count(name) == 1 else path)
            for path, name in zip(paths, short)]


def find(records, name):
    '''The index of the guest with a name or source: None if there is none'''
    for key in 'guest', 'source':
        for index, rec in enumerate(records):
            if rec[key] == name:
                return index
    return None


def hint(records):
    '''What to say below a table: None if there is nothing'''
    guests = [rec['guest'] for rec in records if rec['polling-interval'] == 0]
    if not guests:
        return None
    return ('Nobody asks these guests for statistics (see --poll): '
            + clean(', '.join(guests)))
