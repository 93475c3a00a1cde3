//! Recorded work: CUDA graphs, captured from the compute stream.

use cudarc::driver::{DriverError, result, sys};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the compute stream is being captured.
#[derive(Default)]
pub struct Capture {
    is_on: AtomicBool,
}

impl Capture {
    /// Whether a capture is under way.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Panics while a capture is under way: `what` would be recorded with today's bytes, or wait for work that is not being done.
    pub fn refuse(&self, what: &str) {
        assert!(!self.is_on(), "{what} while work is recorded");
    }

    /// Begins to capture. The context must be current, here and below.
    pub fn begin(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // Relaxed: memory may be asked for meanwhile, which in the other modes spoils the capture.
        // SAFETY: a live stream.
        unsafe { result::stream::begin_capture(stream, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED) }?;
        self.is_on.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Ends the capture: a graph that can be launched.
    pub fn end(&self, stream: sys::CUstream) -> Result<sys::CUgraphExec, DriverError> {
        self.is_on.store(false, Ordering::Relaxed);
        // SAFETY: a stream that is being captured, whose graph is instantiated and destroyed once.
        unsafe {
            let graph = result::stream::end_capture(stream)?;
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph)?;
            executable
        }
    }
}

/// Launches recorded work.
pub fn launch(executable: sys::CUgraphExec, stream: sys::CUstream) -> Result<(), DriverError> {
    // SAFETY: the callers' handles are live.
    unsafe { result::graph::launch(executable, stream) }
}

/// Ends a graph; launches under way are not disturbed.
pub fn forget(executable: sys::CUgraphExec) -> Result<(), DriverError> {
    // SAFETY: the caller's handle is live and ends here.
    unsafe { result::graph::exec_destroy(executable) }
}
