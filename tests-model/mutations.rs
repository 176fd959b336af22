// SPDX-License-Identifier: GPL-2.0-or-later

// Mistakes that the properties have to notice: a name, the file in
// hw-virtio-balloon/core/src, what to replace, by what.  That an element is
// returned twice is not among them, because it would not compile: elements are
// moved.
&[
    ("lost_at_a_stop", "engine.rs", "work.put_back(host);", "work = Default::default();"),
    ("in_flight_after_a_stop", "engine.rs", "if !host.vm_running() && turn", "if false && turn"),
    ("kept_over_a_reset", "engine.rs", "let current = turn.epoch == self.epoch;", "let current = true;"),
    ("reset_not_noticed", "engine.rs", "self.epoch.wrapping_add(1)", "self.epoch"),
    ("two_turns_at_once", "engine.rs", "*again = true;\n            return None;", "*again = true;"),
    ("notification_lost", "engine.rs", "*again = true;", "let _ = again;"),
    ("notification_during_a_stale_turn_lost", "engine.rs", "let pending = again || (current && more);", "let pending = current && more;"),
    ("next_turn_not_scheduled", "engine.rs", "if pending && host.vm_running()", "if false"),
    ("scheduled_while_stopped", "engine.rs", "if pending && host.vm_running()", "if pending"),
    ("left_after_migration", "engine.rs", "if self.state == State::Idle {\n            self.state = State::Pending;", "if self.state == State::Idle {"),
    ("left_after_cont", "engine.rs", "if host.engine(|engine| engine.state == State::Pending)", "if false"),
    ("pause_for_ever", "engine.rs", "pause.saturating_sub(1)", "pause"),
    ("turn_in_a_pause", "engine.rs", "if host.engine(|engine| engine.pause == 0)", "if true"),
    ("no_pause", "engine.rs", "self.pause = PAUSE;", ""),
    ("pause_over_a_reset", "engine.rs", "self.pause = 0;\n        self.delay = 0;\n        std::mem", "std::mem"),
    ("endless_turn", "engine.rs", "if !more || budget.is_spent()", "if !more"),
    ("returned_before_its_discard", "page_work.rs", "if all && turn.is_current(host) {", "let _ = all;\n            if turn.is_current(host) {"),
    ("returned_before_the_flush", "page_work.rs", "if !sink.flush() {", "std::mem::forget(sink);\n        if false {"),
    ("returned_without_memory", "page_work.rs", "return Progress::Blocked;", "self.complete(host, turn);\n                return Progress::More;"),
    ("goes_on_behind_what_is_missing", "page_work.rs", "(self.next, self.done, self.tally) = before;", "let _ = before;"),
    ("counted_twice_after_waiting", "page_work.rs", "(self.next, self.done, self.tally) = before;", "(self.next, self.done) = (before.0, before.1);"),
    ("not_tried_again", "engine.rs", "if blocked {\n            host.schedule_after(delay);", "if blocked {\n            let _ = delay;"),
    ("tried_again_at_once", "engine.rs", "if blocked {\n            host.schedule_after(delay);", "if blocked {\n            host.schedule_after(delay.min(1));"),
    ("waits_longer_and_longer", "engine.rs", "if blocked { 2 * delay } else { 0 }", "if blocked { 2 * delay } else { self.delay }"),
    ("elements_mixed", "page_work.rs", "host.batch().min(host.capacity())", "host.capacity()"),
    ("returned_after_a_reset", "page_work.rs", "if !turn.is_current(host) {\n                return;\n            }\n            host.push", "host.push"),
    ("driver_not_notified", "page_work.rs", "host.notify();", ""),
    ("put_back_in_wrong_order", "page_work.rs", "while let Some(elem) = self.complete.pop() {", "for elem in std::mem::take(&mut self.complete) {"),
    ("rest_of_a_large_element_forgotten", "page_work.rs", "self.unfinished = Some((elem, next))", "{ let _ = next; self.complete.push(elem) }"),
    ("page_left_out", "page_work.rs", "last - run.first + 1", "last - run.first + 2"),
    ("discards_beyond_the_budget", "page_work.rs", "if budget.is_discard_spent() {\n                break;\n            }", ""),
    ("too_many_in_flight", "page_work.rs", "host.batch().min(host.capacity())", "host.batch()"),
    ("report_continued_with_another_element", "report_work.rs", "if let Some(elem) = std::mem::take(self).current {\n                host.push", "if let Some(elem) = self.current.take() {\n                host.push"),
    ("report_lost_at_a_reset", "report_work.rs", "if done && turn.is_current(host) {", "if done {"),
    ("part_of_a_report_left_out", "report_work.rs", "self.done += part;", "self.done += part + page_size;"),
    ("report_returned_before_its_discard", "report_work.rs", "host.discard(elem, &parts);", ""),
]
