//! A share of one processor that several threads keep within altogether, and that can be changed while they work.

use crate::link::shaper::Shaper;
use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Who waits looks so often whether it is still to.
const GLANCE: Duration = Duration::from_millis(20);

/// How long the calling thread has been on a processor.
pub(crate) fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.max(0) as u32)
}

/// What threads may take of one processor. Work is paid for when it is done, in time: as a token bucket of processor time, that is shared
/// by all who have a clone of this.
#[derive(Clone, Debug)]
pub(crate) struct CpuShare(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Whether there is a limit now: read by every worker after every batch, written with the state locked.
    limits: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    epoch: Instant,
}

#[derive(Debug)]
struct State {
    percent: Option<u32>,
    /// Somebody waits for the work: it is not limited until this is over.
    lifted: bool,
    /// Of nanoseconds on a processor.
    bucket: Shaper,
}

impl State {
    fn limit(&self) -> Option<u32> {
        self.percent.filter(|_| !self.lifted)
    }
}

/// Nanoseconds on a processor in a second.
fn rate(percent: u32) -> u64 {
    u64::from(percent) * 10_000_000
}

impl CpuShare {
    /// Per cent of one processor (200: two of them); `None` is no limit.
    pub(crate) fn new(percent: Option<u32>) -> Self {
        let bucket = Shaper::new(rate(percent.unwrap_or(100)));
        let state = Mutex::new(State { percent, lifted: false, bucket });
        Self(Arc::new(Inner {
            limits: AtomicBool::new(percent.is_some()),
            state,
            changed: Condvar::new(),
            epoch: Instant::now(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one step.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was asked for, lifted or not.
    pub(crate) fn percent(&self) -> Option<u32> {
        self.lock().percent
    }

    /// What holds now: none while it is lifted.
    pub(crate) fn limit(&self) -> Option<u32> {
        self.lock().limit()
    }

    /// Whether somebody waits for what is done now.
    pub(crate) fn is_lifted(&self) -> bool {
        self.lock().lifted
    }

    /// The part of the time in which each of so many threads may work now, if they do equally much.
    pub(crate) fn each(&self, threads: usize) -> f64 {
        let share = |percent| f64::from(percent) / 100.0 / threads.max(1) as f64;
        self.limit().map_or(1.0, share)
    }

    /// Another share from now on: also for those that wait.
    pub(crate) fn set(&self, percent: Option<u32>) {
        let mut state = self.lock();
        if let Some(percent) = percent {
            match state.percent {
                Some(_) => state.bucket.set_rate(self.0.epoch.elapsed(), rate(percent)),
                // What was done without a limit is not made up for.
                None => state.bucket = Shaper::new(rate(percent)),
            }
        }
        state.percent = percent;
        self.tell(&state);
    }

    /// What is done from now on is waited for by somebody, or is not any more. Who waits at this moment goes on.
    pub(crate) fn lift(&self, lifted: bool) {
        let mut state = self.lock();
        if state.lifted && !lifted {
            // As of `set`.
            state.bucket = Shaper::new(rate(state.percent.unwrap_or(100)));
        }
        state.lifted = lifted;
        self.tell(&state);
    }

    fn tell(&self, state: &State) {
        self.0.limits.store(state.limit().is_some(), Ordering::Relaxed);
        self.0.changed.notify_all();
    }

    fn limits(&self) -> bool {
        self.0.limits.load(Ordering::Relaxed)
    }

    /// So much work was done: how long those who share this have to rest now.
    pub(crate) fn owe(&self, work: Duration) -> Duration {
        if !self.limits() {
            return Duration::ZERO;
        }
        let mut state = self.lock();
        match state.limit() {
            None => Duration::ZERO,
            Some(_) => state.bucket.owe(self.0.epoch.elapsed(), work.as_nanos() as u64),
        }
    }

    /// Waits until all work is paid for, or `stop` says that it is not to be waited.
    pub(crate) fn wait(&self, stop: impl Fn() -> bool) {
        let mut state = self.lock();
        while state.limit().is_some() {
            let left = state.bucket.owe(self.0.epoch.elapsed(), 0);
            if left.is_zero() || stop() {
                return;
            }
            let woken = self.0.changed.wait_timeout(state, left.min(GLANCE));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The work of one thread, for a share. It has to be used on this thread alone.
#[derive(Debug)]
pub(crate) struct CpuMeter {
    share: CpuShare,
    /// What the thread had worked when it paid last; none while nothing is to be paid, because asking takes a system call.
    paid: Option<Duration>,
}

impl CpuMeter {
    /// What the calling thread works from now on.
    pub(crate) fn new(share: &CpuShare) -> Self {
        let mut meter = Self { share: share.clone(), paid: None };
        meter.begin();
        meter
    }

    /// What it has worked since it paid last somebody else pays for, or nobody.
    pub(crate) fn begin(&mut self) {
        self.paid = self.share.limits().then(processor_time);
    }

    /// Pays for what it has worked, and says how long it has to rest for it.
    pub(crate) fn owe(&mut self) -> Duration {
        let before = self.paid;
        self.begin();
        match (before, self.paid) {
            (Some(before), Some(now)) => self.share.owe(now.saturating_sub(before)),
            _ => Duration::ZERO,
        }
    }

    /// Pays, and rests, unless `stop` says that it is not to.
    pub(crate) fn pay(&mut self, stop: impl Fn() -> bool) {
        if !self.owe().is_zero() {
            self.share.wait(stop);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Something that must not be waited for takes less.
    const LIMIT: Duration = Duration::from_secs(60);

    fn work(time: Duration) {
        let until = processor_time() + time;
        while processor_time() < until {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn threads_keep_within_their_share_together() {
        let share = CpuShare::new(Some(40));
        let began = Instant::now();
        let worked: Duration = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let (mut meter, before) = (CpuMeter::new(&share), processor_time());
                        while began.elapsed() < Duration::from_millis(600) {
                            work(Duration::from_millis(1));
                            meter.pay(|| false);
                        }
                        processor_time() - before
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        // What was begun is brought to its end, and a pause of the machine is made up for.
        let most = began.elapsed().mul_f64(0.4) + Duration::from_millis(3 + 20);
        assert!(worked <= most, "{worked:?} of {most:?}");
    }

    #[test]
    fn who_waits_hears_of_a_change() {
        let changes: [fn(&CpuShare); 3] =
            [|share| share.set(None), |share| share.set(Some(1_000_000)), |share| share.lift(true)];
        for change in changes {
            let share = CpuShare::new(Some(1));
            // Lasts for a day, and at the higher one for nine seconds.
            assert!(share.owe(Duration::from_secs(900)) > Duration::from_secs(80_000));
            let (tell, told) = std::sync::mpsc::channel();
            let its = share.clone();
            let waits = std::thread::spawn(move || {
                its.wait(|| false);
                tell.send(()).unwrap();
            });
            change(&share);
            told.recv_timeout(LIMIT).expect("the new share is waited for, and not the old one");
            waits.join().unwrap();
        }
        let share = CpuShare::new(Some(1));
        share.owe(Duration::from_secs(900));
        share.wait(|| true);
    }

    #[test]
    fn what_is_done_without_a_limit_is_not_paid_for() {
        let share = CpuShare::new(None);
        let mut meter = CpuMeter::new(&share);
        work(Duration::from_millis(2));
        share.set(Some(1));
        assert_eq!(meter.owe(), Duration::ZERO);
        work(Duration::from_millis(2));
        assert!(meter.owe() >= Duration::from_millis(150));
        share.lift(true);
        assert_eq!((share.limit(), share.percent()), (None, Some(1)));
        work(Duration::from_millis(2));
        assert_eq!(meter.owe(), Duration::ZERO);
        share.lift(false);
        assert_eq!((meter.owe(), share.owe(Duration::ZERO)), (Duration::ZERO, Duration::ZERO));
        assert_eq!(share.percent(), Some(1));
    }
}
