// SPDX-License-Identifier: GPL-2.0-or-later

//! The state machine of free page hinting (virtio 1.3, section 5.5.6.5)
//!
//! Migration requests hints: the device puts a command ID into the
//! configuration space.  The driver repeats the ID in the queue, and then adds
//! blocks of free pages.  Migration or the driver ends the round.  Finally,
//! migration lets the driver have its pages back.
//!
//! The ID stays in the configuration space until the round ends, as hints are
//! only valid while the ID there is the one that the driver has repeated
//! (section 5.5.6.5.2).  Linux reads the ID at each configuration change
//! interrupt, and ends the round unless it is still the same.

/// In the configuration space: the driver should stop hinting
pub const VIRTIO_BALLOON_CMD_ID_STOP: u32 = 0;
/// In the configuration space: the driver can reuse the pages it has hinted
pub const VIRTIO_BALLOON_CMD_ID_DONE: u32 = 1;
/// The smallest ID of a round; smaller ones are reserved
pub const CMD_ID_MIN: u32 = 0x8000_0000;

/// The state of a round.  The numbers are part of the migration stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum HintStatus {
    /// No round is going on, or the current one has ended
    #[default]
    Stop = 0,
    /// The driver has been asked to start a round
    Requested = 1,
    /// The driver is sending hints
    Start = 2,
    /// The driver can have back all the pages that it has hinted
    Done = 3,
}

impl TryFrom<u32> for HintStatus {
    type Error = u32;

    fn try_from(value: u32) -> Result<Self, u32> {
        Ok(match value {
            0 => Self::Stop,
            1 => Self::Requested,
            2 => Self::Start,
            3 => Self::Done,
            _ => return Err(value),
        })
    }
}

/// The state of free page hinting
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hinting {
    status: HintStatus,
    cmd_id: u32,
}

impl Default for Hinting {
    fn default() -> Self {
        Self {
            status: HintStatus::Stop,
            cmd_id: CMD_ID_MIN,
        }
    }
}

impl Hinting {
    /// The state after migration.  Hints are for the source, so a round that
    /// was going on there has ended.  (Sources set [`HintStatus::Done`] before
    /// they send the state.)
    pub fn arrive(status: HintStatus, cmd_id: u32) -> Self {
        let mut this = Self { status, cmd_id };
        this.withdraw();
        this
    }

    /// The current status
    pub const fn status(&self) -> HintStatus {
        self.status
    }

    /// The ID of the current or latest round
    pub const fn cmd_id(&self) -> u32 {
        self.cmd_id
    }

    /// Whether hints from the driver belong to the current round
    pub fn is_hinting(&self) -> bool {
        self.status == HintStatus::Start
    }

    /// What the driver sees in the configuration space
    pub const fn config_cmd_id(&self) -> u32 {
        match self.status {
            HintStatus::Requested | HintStatus::Start => self.cmd_id,
            HintStatus::Done => VIRTIO_BALLOON_CMD_ID_DONE,
            HintStatus::Stop => VIRTIO_BALLOON_CMD_ID_STOP,
        }
    }

    /// Migration wants hints: begin a new round.  Returns true, because the
    /// driver always has to be told.
    pub fn request(&mut self) -> bool {
        self.cmd_id = self.cmd_id.checked_add(1).unwrap_or(CMD_ID_MIN);
        self.status = HintStatus::Requested;
        true
    }

    /// Migration does not need hints any longer.  Returns whether the driver
    /// has to be told.
    pub fn stop(&mut self) -> bool {
        self.set_status(HintStatus::Stop)
    }

    /// The driver can have its pages back.  Returns whether it has to be told.
    pub fn done(&mut self) -> bool {
        self.set_status(HintStatus::Done)
    }

    /// The driver has withdrawn the feature, or migration does not want hints:
    /// end the round, if there is one.  Returns whether there was one.
    pub fn withdraw(&mut self) -> bool {
        matches!(self.status, HintStatus::Requested | HintStatus::Start) && self.stop()
    }

    fn set_status(&mut self, status: HintStatus) -> bool {
        std::mem::replace(&mut self.status, status) != status
    }

    /// The driver has sent a command ID.  The ID of the requested round starts
    /// that round; while a round is active, any ID ends it.  Other IDs have no
    /// effect, so that a late stop of the previous round does not end the next
    /// one.
    pub fn command(&mut self, id: u32) {
        match self.status {
            HintStatus::Requested if id == self.cmd_id => self.status = HintStatus::Start,
            HintStatus::Start => self.status = HintStatus::Stop,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(status: HintStatus, cmd_id: u32) -> Hinting {
        Hinting { status, cmd_id }
    }

    #[test]
    fn a_round() {
        let mut h = Hinting::default();
        assert_eq!(h.config_cmd_id(), VIRTIO_BALLOON_CMD_ID_STOP);

        h.request();
        let id = h.config_cmd_id();
        assert_eq!(id, CMD_ID_MIN + 1);
        assert!(!h.is_hinting());

        h.command(id);
        assert!(h.is_hinting());
        assert_eq!(h.config_cmd_id(), id);
        h.command(VIRTIO_BALLOON_CMD_ID_STOP);
        assert!(!h.is_hinting());
        assert_eq!(h.config_cmd_id(), VIRTIO_BALLOON_CMD_ID_STOP);
        assert_eq!(h.status(), HintStatus::Stop);

        assert!(h.done());
        assert!(!h.done());
        assert_eq!(h.config_cmd_id(), VIRTIO_BALLOON_CMD_ID_DONE);
    }

    #[test]
    fn ids_wrap_to_the_minimum() {
        let mut h = Hinting::arrive(HintStatus::Done, u32::MAX - 1);
        h.request();
        assert_eq!(h.config_cmd_id(), u32::MAX);
        h.request();
        assert_eq!(h.config_cmd_id(), CMD_ID_MIN);
    }

    #[test]
    fn stale_commands_are_ignored() {
        let mut h = Hinting::default();
        h.request();
        let first = h.cmd_id();
        h.stop();
        h.request();

        h.command(VIRTIO_BALLOON_CMD_ID_STOP);
        assert_eq!(h.status(), HintStatus::Requested);
        h.command(first);
        assert_eq!(h.status(), HintStatus::Requested);
        h.command(h.cmd_id());
        assert_eq!(h.status(), HintStatus::Start);
    }

    #[test]
    fn commands_do_not_end_stop_or_done() {
        for status in [HintStatus::Stop, HintStatus::Done] {
            for id in [0, 1, CMD_ID_MIN, u32::MAX] {
                let mut h = at(status, CMD_ID_MIN);
                h.command(id);
                assert_eq!(h.status(), status);
            }
        }
    }

    #[test]
    fn rounds_end_when_they_arrive() {
        for n in 0..4 {
            let status = HintStatus::try_from(n).unwrap();
            let h = Hinting::arrive(status, CMD_ID_MIN + 7);
            let done = status == HintStatus::Done;
            assert_eq!(h.status() == HintStatus::Done, done);
            assert_eq!(h.config_cmd_id(), u32::from(done));
            assert_eq!(h.cmd_id(), CMD_ID_MIN + 7);
        }
    }

    #[test]
    fn withdraw_in_each_state() {
        for n in 0..4 {
            let status = HintStatus::try_from(n).unwrap();
            let in_round = matches!(status, HintStatus::Requested | HintStatus::Start);
            let mut h = at(status, CMD_ID_MIN);
            assert_eq!(h.withdraw(), in_round);
            let expected = if in_round { HintStatus::Stop } else { status };
            assert_eq!(h.status(), expected);
        }
    }

    #[test]
    fn stop_in_each_state() {
        for n in 0..4 {
            let status = HintStatus::try_from(n).unwrap();
            let mut h = at(status, CMD_ID_MIN);
            assert_eq!(h.stop(), status != HintStatus::Stop);
            assert_eq!(h.status(), HintStatus::Stop);
        }
        assert_eq!(HintStatus::try_from(4), Err(4));
    }

    /// What can happen to hinting
    #[derive(Clone, Copy, Debug)]
    enum Event {
        Request,
        Stop,
        Done,
        /// The driver repeats the ID of the last round
        Repeat,
        /// The driver repeats the ID of the round before the last
        Stale,
        /// The driver sends the ID that ends a round
        End,
        /// The VM is migrated
        Migrate,
    }

    const EVENTS: [Event; 7] = [
        Event::Request,
        Event::Stop,
        Event::Done,
        Event::Repeat,
        Event::Stale,
        Event::End,
        Event::Migrate,
    ];

    /// Hinting as the specification describes it: computed from the history of
    /// events, instead of with a state machine
    #[derive(Clone)]
    struct Model {
        /// IDs of all rounds that were requested
        rounds: Vec<u32>,
        /// Whether the driver has started the last round
        begun: bool,
        /// Whether the last round is over, for any reason
        over: bool,
        /// Whether the driver can reuse the pages
        released: bool,
    }

    impl Model {
        fn apply(&mut self, event: Event, id: u32) {
            match event {
                Event::Request => {
                    let last = *self.rounds.last().unwrap();
                    self.rounds.push(if last == u32::MAX {
                        0x8000_0000
                    } else {
                        last + 1
                    });
                    self.begun = false;
                    self.over = false;
                    self.released = false;
                }
                Event::Stop => {
                    self.over = true;
                    self.released = false;
                }
                Event::Done => {
                    self.over = true;
                    self.released = true;
                }
                Event::Repeat | Event::Stale | Event::End if self.over => {}
                Event::Repeat | Event::Stale | Event::End if self.begun => self.over = true,
                Event::Repeat | Event::Stale | Event::End => {
                    self.begun = Some(&id) == self.rounds.last();
                }
                Event::Migrate => self.over = true,
            }
        }

        fn id(&self, event: Event) -> u32 {
            let n = self.rounds.len();
            match event {
                Event::Repeat => self.rounds[n - 1],
                Event::Stale => self.rounds[n.saturating_sub(2)],
                _ => VIRTIO_BALLOON_CMD_ID_STOP,
            }
        }

        fn check(&self, h: &Hinting) {
            assert_eq!(h.is_hinting(), self.begun && !self.over);
            assert_eq!(h.cmd_id(), *self.rounds.last().unwrap());
            let shown = if self.released {
                1
            } else if self.over {
                0
            } else {
                h.cmd_id()
            };
            assert_eq!(h.config_cmd_id(), shown);
        }
    }

    fn explore(h: Hinting, model: &Model, depth: u32) -> u64 {
        model.check(&h);
        if depth == 0 {
            return 1;
        }
        EVENTS
            .iter()
            .map(|&event| {
                let (mut h, mut model) = (h, model.clone());
                let id = model.id(event);
                let before = h.config_cmd_id();
                let told = match event {
                    Event::Request => {
                        h.request();
                        true
                    }
                    Event::Stop => h.stop(),
                    Event::Done => h.done(),
                    Event::Repeat | Event::Stale | Event::End => {
                        h.command(id);
                        // The driver need not be told of what it has done
                        // itself
                        true
                    }
                    Event::Migrate => {
                        let status = HintStatus::try_from(h.status() as u32).unwrap();
                        h = Hinting::arrive(status, h.cmd_id());
                        // Migration ends the round without telling the driver
                        true
                    }
                };
                model.apply(event, id);
                assert!(told || h.config_cmd_id() == before);
                explore(h, &model, depth - 1)
            })
            .sum()
    }

    /// Tries all sequences of 6 events, which are enough for two rounds,
    /// beginning with the initial state and with one in which the IDs are about
    /// to wrap.
    #[test]
    fn exhaustive() {
        for last in [CMD_ID_MIN, u32::MAX - 1] {
            let h = at(HintStatus::Stop, last);
            let model = Model {
                rounds: vec![last],
                begun: false,
                over: true,
                released: false,
            };
            let depth = 6;
            assert_eq!(explore(h, &model, depth), 7u64.pow(depth));
        }
    }
}
