//! Communication that owns what it reads and writes while it is under way, and gives it back at the end: for what goes on while
//! other work runs that borrows the same structures. Touching it meanwhile is impossible, because it is not there.

use super::{Communicator, Pending};
use std::marker::PhantomData;
use std::ptr::NonNull;

/// Communication under way over `held`. Dropped, it completes like a [`Pending`].
#[must_use = "communication is complete only after wait()"]
pub struct InFlight<'c, T> {
    pending: Option<Pending<'c>>,
    held: NonNull<T>,
    owns: PhantomData<T>,
}

impl<'c, T: 'c> InFlight<'c, T> {
    /// Starts what `start` starts on `held`.
    pub fn start(
        comm: &'c dyn Communicator,
        held: T,
        start: impl for<'t> FnOnce(&'t dyn Communicator, &'t mut T) -> Pending<'t>,
    ) -> InFlight<'c, T> {
        let held = NonNull::from(Box::leak(Box::new(held)));
        // SAFETY: the memory is this value's own, stays where it is, and is neither read nor released before `pending`, the only
        // one to use this borrow, is gone (`wait` and `drop`).
        let lent: &'c mut T = unsafe { &mut *held.as_ptr() };
        InFlight { pending: Some(start(comm, lent)), held, owns: PhantomData }
    }

    /// Blocks until the communication is complete, and gives back what it used.
    pub fn wait(mut self) -> T {
        if let Some(pending) = self.pending.take() {
            pending.wait();
        }
        let held = self.held;
        std::mem::forget(self);
        // SAFETY: made by `Box::leak` in `start`, and taken back once: this value's own `drop` does not run.
        *unsafe { Box::from_raw(held.as_ptr()) }
    }
}

impl<T> Drop for InFlight<'_, T> {
    fn drop(&mut self) {
        drop(self.pending.take());
        // SAFETY: made by `Box::leak` in `start`, and taken back once: `wait` forgets this value before it does the same.
        drop(unsafe { Box::from_raw(self.held.as_ptr()) });
    }
}
