//! Recorded work: CUDA graphs, captured from the compute stream.

use cudarc::driver::{DriverError, result, sys};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the compute stream is being captured, and after what.
#[derive(Default)]
pub struct Capture {
    is_on: AtomicBool,
    /// The last that was captured is a kernel of ours.
    is_after_kernel: AtomicBool,
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

    /// A kernel of ours is captured next. Whether the one before it is one too, with nothing between them: then it may come onto the
    /// device before that one has ended (kernels/common.cuh). An edge of this kind leads from kernel to kernel only.
    pub fn kernel(&self) -> bool {
        self.is_on() && self.is_after_kernel.swap(true, Ordering::Relaxed)
    }

    /// Something else is, or may be.
    pub fn other_work(&self) {
        self.is_after_kernel.store(false, Ordering::Relaxed);
    }

    /// Begins to capture. The context must be current, here and below.
    pub fn begin(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // Relaxed: memory may be asked for meanwhile, which in the other modes spoils the capture.
        // SAFETY: a live stream.
        unsafe { result::stream::begin_capture(stream, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED) }?;
        self.is_on.store(true, Ordering::Relaxed);
        self.other_work();
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
