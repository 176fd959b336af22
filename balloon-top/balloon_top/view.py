# SPDX-License-Identifier: GPL-2.0-or-later
'''Tables and plots'''

import io
import re

import plotext
import rich.table
from rich import box
from rich.console import Console, Group
from rich.text import Text

from . import model

# With fewer columns, the summaries are below the table.
WIDE = 112

# The width and height of what is not for a terminal
WIDTH = 144
PLOT_HEIGHT = 20

# What is plotted: key, colour, and the character without colours
SERIES = [('target', 'blue', 't'), ('available', 'green', 'v'),
          ('actual', 'red', 'a')]


def says(rec):
    '''The text about a guest, with its style'''
    if rec['error'] is not None:
        return Text(rec['error'], style='bold red')
    style = 'bold red' if rec['driver'] == 'broken' \
        or rec['waiting-for-memory'] else ''
    return Text(rec['summary'] or '-', style=style)


class Table:
    '''A table of guests, which fits into whatever shows it'''

    def __init__(self, records):
        self._records = records

    def __rich_console__(self, _console, options):
        yield table(self._records, options.max_width)


class Plot:
    '''A plot of a guest, which fits into whatever shows it'''

    def __init__(self, records):
        self._records = records

    def __rich_console__(self, console, options):
        yield plot(self._records,
                   (options.max_width, options.height or PLOT_HEIGHT),
                   console.color_system is not None)


def table(records, width):
    '''A table of guests'''
    if not records:
        return Text('No domain is running.')
    is_wide = width >= WIDE
    result = rich.table.Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        padding=(0, int(is_wide), 0, 0))
    result.add_column('guest', no_wrap=True, overflow='ellipsis',
                      max_width=24 if is_wide else 12)
    for _, heading, unit, _, _ in model.COLUMNS:
        result.add_column(f'{heading}\n{unit}', justify='right', no_wrap=True)
    if is_wide:
        result.add_column('summary', overflow='fold')
    for rec in records:
        texts = [Text(text) for text in [rec['guest'], *model.cells(rec)]]
        if rec['unasked']:
            # The last one: the guest has been out of memory.
            texts[-1].stylize('bold yellow')
        result.add_row(*texts, *([says(rec)] if is_wide else []))
    below = []
    if not is_wide:
        below += [Text(f'{rec["guest"]}: ').append(says(rec))
                  for rec in records]
    if model.hint(records):
        below.append(Text(model.hint(records), style='dim'))
    return Group(result, *([Text('')] if below else []), *below)


def plot(records, size, colours):
    '''A plot of a guest, of which there are records since some time'''
    latest = records[-1]
    plotext.clear_figure()
    plotext.theme('clear')
    plotext.limit_size(False, False)
    # One line is for the summary, another for the terminal's last one.
    plotext.plotsize(size[0], max(size[1] - 2, 8))
    seconds = latest['time'] - records[0]['time']
    plotext.title(f'{latest["guest"]}: MiB over {seconds:.0f} s')
    highest = 0
    for key, colour, character in SERIES:
        points = [(rec['time'] - latest['time'], rec[key] / model.MIB)
                  for rec in records if rec[key] is not None]
        if points:
            highest = max(highest, *(point[1] for point in points))
            label = f'{key} {model.size_text(points[-1][1] * model.MIB)}'
            plotext.plot(*zip(*points), label=label,
                         marker='hd' if colours else character,
                         color=colour if colours else None)
    plotext.ylim(0, highest * 1.1)
    if not highest:
        return Group(Text(f'{latest["guest"]}: nothing is known'),
                     says(latest))
    return Group(Text.from_ansi(plotext.build()), says(latest))


def save(renderable, width, path, title='qemu-balloon-top'):
    '''Write a picture.'''
    console = Console(record=True, file=io.StringIO(), width=width,
                      force_terminal=True, color_system='truecolor')
    console.print(renderable)
    svg = console.export_svg(title=title, unique_id='balloon-top')
    # The fonts would come from the network.
    svg = re.sub(r'@font-face \{.*?\}\s*', '', svg, flags=re.DOTALL)
    with open(path, 'w', encoding='utf-8') as file:
        file.write(svg)
