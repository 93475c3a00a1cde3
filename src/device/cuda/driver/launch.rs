//! Launches of kernels.

use crate::device::cuda::backend::Grid;
use cudarc::driver::{DriverError, sys};
use std::ffi::c_void;

/// Launches a kernel; where `is_dependent`, it comes onto the device once all blocks of the kernel before it in the stream are there,
/// and waits for that one's end by itself (programmatic dependent launch).
///
/// # Safety
/// A kernel of a loaded module of the current context and its stream; `pointers` show its arguments, in number and type. A dependent one
/// follows a kernel, and both do as kernels/common.cuh says.
pub unsafe fn kernel(
    function: sys::CUfunction,
    grid: Grid,
    stream: sys::CUstream,
    pointers: &mut [*mut c_void],
    is_dependent: bool,
) -> Result<(), DriverError> {
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { pad: [0; 64] },
    };
    attribute.value.programmaticStreamSerializationAllowed = 1;
    let config = sys::CUlaunchConfig {
        gridDimX: grid.blocks.0,
        gridDimY: grid.blocks.1,
        gridDimZ: grid.blocks.2,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared_bytes,
        hStream: stream,
        attrs: &mut attribute,
        numAttrs: u32::from(is_dependent),
    };
    // SAFETY: as promised by the caller; the configuration and what it points to live during the call.
    unsafe { sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) }.result()
}
