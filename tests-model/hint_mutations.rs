// SPDX-License-Identifier: GPL-2.0-or-later

// Like mutations.rs, for mistakes that the model of the threads has to notice.
// The first entry is not a mistake.
&[
    ("unchanged", "hint_exchange.rs", "inner.waiting = true;", "inner.waiting = true;"),
    ("no_wait", "hint_exchange.rs", "let taken = inner.taken;", "let taken = 0;"),
    ("no_wait_for_stop", "hint_exchange.rs", "drop(self.wait(inner));", "drop(inner);"),
    ("no_wait_for_drop", "hint_exchange.rs", "let mut inner = self.wait(inner);", ""),
    ("waits_for_the_next_element", "hint_exchange.rs", "while inner.finished < taken {", "while inner.finished <= taken {"),
    ("nobody_is_woken", "hint_exchange.rs", "self.finished.notify_all();", ""),
    ("finished_too_early", "hint_exchange.rs", "inner.taken += 1;", "inner.taken += 1;\n            inner.finished += 1;"),
    ("state_not_looked_at_again", "hint_exchange.rs", "while command != Command::Bad && self.may_hint() && elem.hint(index)", "while command != Command::Bad && (index > 0 || self.may_hint()) && elem.hint(index)"),
    ("stop_not_noticed", "hint_exchange.rs", "inner.state.is_hinting() && !inner.waiting", "!inner.waiting"),
    ("waiting_not_noticed", "hint_exchange.rs", "inner.state.is_hinting() && !inner.waiting", "inner.state.is_hinting()"),
    ("waiting_forever", "hint_exchange.rs", "inner.waiting = false;", ""),
    ("lock_held_for_an_element", "hint_exchange.rs", "self.lock().state.apply(command);\n            let mut index = 0;", "let mut inner = self.lock();\n            inner.state.apply(command);\n            let mut index = 0;\n            while command != Command::Bad && inner.state.is_hinting() && elem.hint(index) { index += 1; }\n            drop(inner);"),
    ("locked_twice", "hint_exchange.rs", "drop(inner);\n        self.finished.notify_all();", "let _twice = self.lock();\n        drop(inner);\n        self.finished.notify_all();"),
    ("scheduled_forever", "hint_exchange.rs", "inner.scheduled = false;", ""),
    ("never_scheduled", "hint_exchange.rs", "inner.pending.push_back(elem);\n        !std::mem::replace(&mut inner.scheduled, true)", "inner.pending.push_back(elem);\n        false"),
    ("pending_not_taken", "hint_exchange.rs", "let pending = take(&mut inner.pending);", "let pending = VecDeque::new();"),
    ("done_taken_before_the_wait", "hint_exchange.rs", "let mut inner = self.wait(inner);\n        (take(&mut inner.done), pending)", "let done = take(&mut inner.done);\n        let inner = self.wait(inner);\n        (done, pending)"),
    ("pending_taken_after_the_wait", "hint_exchange.rs", "let pending = take(&mut inner.pending);\n        let mut inner = self.wait(inner);\n        (take(&mut inner.done), pending)", "let mut inner = self.wait(inner);\n        let pending = take(&mut inner.pending);\n        (take(&mut inner.done), pending)"),
    ("done_lost", "hint_exchange.rs", "inner.done.push_back(processed);", "if inner.done.is_empty() { inner.done.push_back(processed); }"),
    ("wrong_order", "hint_exchange.rs", "inner.done.push_back(processed);", "inner.done.push_front(processed);"),
    ("never_goes_on", "hint_exchange.rs", "!inner.pending.is_empty() && !std::mem", "inner.pending.is_empty() && !std::mem"),
    ("last_first", "hint_exchange.rs", "inner.pending.pop_front()", "inner.pending.pop_back()"),
    ("command_of_the_rest_ignored", "hint_exchange.rs", "let command = elem.command();\n            self.lock().state.apply(command);\n            Processed", "let command = elem.command();\n            Processed"),
]
