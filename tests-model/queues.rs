// SPDX-License-Identifier: GPL-2.0-or-later

// The two kinds of queues, with what each needs from the model.  This file is
// included by model.rs.

/// The second field is the life of the queue for which the port is made.
struct Pages(Rc<World<PageWork<Element>>>, u32);
struct Reports(Rc<World<ReportWork<Element>>>, u32);

macro_rules! impl_device {
    ($t:ident, $work:ty) => {
        impl Device for $t {
            fn now(world: &Rc<World<$work>>) -> Self {
                Self(world.clone(), world.log.life.get())
            }
            fn world(&self) -> &Rc<World<$work>> {
                &self.0
            }
        }

        impl Port for $t {
            type Element = Element;
            type Work = $work;

            fn capacity(&self) -> usize {
                self.0.capacity
            }
            fn pop(&self) -> Option<Element> {
                let elem = self.0.pop();
                if let Some(elem) = &elem {
                    self.0.charge(elem.request.buffers.len() + 1, 0, 0, 0);
                }
                self.called();
                elem
            }
            fn buffers(&self, elem: &Element) -> usize {
                elem.request.buffers.len()
            }
            fn push(&self, elem: Element) {
                self.check(&elem);
                self.0.push(&elem);
                self.called();
            }
            fn unpop(&self, elem: Element) {
                self.0.unpop(&elem);
            }
            fn notify(&self) {
                self.0.tick();
                self.0.to_be_notified.set(false);
                self.called();
            }
            fn is_current(&self) -> bool {
                self.1 == self.0.log.life.get()
            }
            fn engine<R>(&self, f: impl FnOnce(&mut Engine<$work>) -> R) -> R {
                self.0.calls.set(self.0.calls.get() + 1);
                assert!(self.0.calls.get() < ENDLESS, "does not end");
                f(&mut self.0.engine.borrow_mut())
            }
            fn budget(&self) -> Budget {
                self.0.budget
            }
            fn vm_running(&self) -> bool {
                self.0.running.get()
            }
            fn schedule(&self) {
                assert!(self.0.running.get());
                self.0.scheduled.set(true);
                self.0.left_work.set(true);
            }
            fn schedule_after(&self, delay: u32) {
                assert!(self.0.running.get() && self.0.refused.get());
                // The delay doubles, up to a second, until there is memory
                let last = self.0.delay.replace(delay);
                assert_eq!(delay, (2 * last).clamp(1, 1000), "delay");
                self.0.left_work.set(true);
                self.0.timer.set(true);
            }
        }
    };
}

impl_device!(Pages, PageWork<Element>);
impl_device!(Reports, ReportWork<Element>);

impl Pages {
    /// Called before an element is returned
    fn check(&self, elem: &Element) {
        let discarded = self.0.discarded.borrow();
        for pfn in &elem.request.pfns {
            assert!(
                discarded.get(&u64::from(*pfn)) > Some(&elem.popped_at),
                "page {pfn} of element {} is returned before it is done",
                elem.id
            );
        }
    }
}

impl PagePort for Pages {
    fn discard(&self, pfns: usize, pieces: &mut Pieces<'_>, budget: &mut Budget) -> Option<Tally> {
        // `pfns` must not be less than the number of PFNs of all elements
        let total: usize = {
            let requests = self.0.requests.borrow();
            let all = self.0.log.in_flight.borrow();
            all.iter().map(|id| requests[id].pfns.len()).sum()
        };
        assert!(pfns >= total, "the elements have more PFNs");

        let mut runs = Vec::new();
        while let Some(run) = pieces.next(budget) {
            assert!(run.first <= run.last);
            self.0.charge(0, 0, 1, run.pages() * PAGE);
            budget.charge_range(run.pages() * PAGE, false);
            runs.push(run);
        }
        let now = self.0.tick();
        let has_memory = self.0.has_memory.get() || runs.is_empty();
        if self.0.has_memory.get() {
            self.0.delay.set(0);
        }
        if has_memory {
            let mut discarded = self.0.discarded.borrow_mut();
            for pfn in runs.iter().flat_map(|run| run.first..=run.last) {
                discarded.insert(pfn.into(), now);
            }
        } else {
            // Some pages may be done, but the device does not know which
            self.0.refused.set(true);
        }
        self.called();
        has_memory.then(|| Tally {
            ram: runs.iter().map(Run::pages).sum(),
            bad: 0,
        })
    }

    fn read_pfns(
        &self,
        elem: &Element,
        position: usize,
        max: usize,
        runs: &mut Runs,
    ) -> Option<usize> {
        assert_eq!(position % 4, 0);
        let left = &elem.request.pfns[position / 4..];
        let n = left.len().min(max);
        self.0.charge(0, n, 0, 0);
        self.0.read.set(self.0.read.get() + n as u64);
        left[..n].iter().for_each(|pfn| runs.push(*pfn));
        (n < left.len()).then_some(position + 4 * n)
    }

    fn batch(&self) -> usize {
        self.0.batch
    }

    fn completed(&self, tally: Tally) {
        self.0.tick();
        let in_flight = self.0.log.in_flight.borrow().len();
        assert!(in_flight <= self.0.batch, "too many elements together");
        // An element can have a page more than once, so this is not the number
        // of PFNs
        self.0.counted.set(self.0.counted.get() + tally.ram);
        assert!(self.0.counted.get() <= self.0.read.get(), "counted twice");
    }

    fn ended(&self) {
        self.0.tick();
    }
}

impl Reports {
    /// An element is about to be returned.
    fn check(&self, elem: &Element) {
        if self.0.inhibited.get() || !self.0.running.get() {
            return;
        }
        let reported = self.0.reported.borrow();
        for (i, pages) in elem.request.buffers.iter().enumerate() {
            let bytes = pages.unwrap_or(0) * self.0.page_size * PAGE;
            let done = reported.get(&(elem.id, i)).copied().unwrap_or(0);
            assert_eq!(done, bytes, "buffer {i} of element {}", elem.id);
        }
    }
}

impl ReportPort for Reports {
    fn may_discard(&self) -> bool {
        !self.0.inhibited.get()
    }

    fn range(&self, elem: &Element, buffer: usize) -> Option<ReportedRange> {
        let page_size = self.0.page_size * PAGE;
        self.0.charge(0, 0, 1, 0);
        elem.request.buffers[buffer].map(|pages| ReportedRange {
            len: pages * page_size,
            page_size,
            cheap: false,
        })
    }

    fn ignored(&self, buffers: usize) {
        self.0.tick();
        assert!(buffers > 0 || !self.may_discard(), "ignores nothing");
    }

    fn discard(&self, elements: &[Element], pieces: &[Piece]) {
        self.0.tick();
        for piece in pieces {
            let elem = &elements[piece.element];
            assert_eq!(
                (piece.offset | piece.len) % (self.0.page_size * PAGE),
                0,
                "host pages"
            );
            self.0.charge(0, 0, 0, piece.len);
            let mut reported = self.0.reported.borrow_mut();
            let done = reported.entry((elem.id, piece.buffer)).or_default();
            assert!(
                *done == piece.offset || piece.offset == 0,
                "a part is left out"
            );
            *done = piece.offset + piece.len;
        }
        self.called();
    }
}
