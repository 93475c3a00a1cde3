//! Modules of kernels.

use cudarc::driver::{DriverError, result, sys};
use std::ffi::{c_uint, c_void};

/// A module of this machine code, all of its kernels on the device. By itself the driver loads each at its first use, which may come
/// while work is captured.
///
/// # Safety
/// Machine code of NVRTC, whole; the context is current.
pub unsafe fn load(code: &[u8]) -> Result<sys::CUmodule, DriverError> {
    // SAFETY: as promised by the caller; alive during the call.
    let module = unsafe { result::module::load_data(code.as_ptr().cast::<c_void>()) }?;
    // SAFETY: a loaded module.
    if let Err(error) = unsafe { load_kernels(module) } {
        // Each is loaded later then.
        log::debug!("kernels are loaded at their first use: {error:?}");
    }
    Ok(module)
}

unsafe fn load_kernels(module: sys::CUmodule) -> Result<(), DriverError> {
    let mut n: c_uint = 0;
    // SAFETY: a loaded module; writes one integer, then as many handles as there is room for.
    let kernels = unsafe {
        sys::cuModuleGetFunctionCount(&mut n, module).result()?;
        let mut kernels = vec![std::ptr::null_mut(); n as usize];
        sys::cuModuleEnumerateFunctions(kernels.as_mut_ptr(), n, module).result()?;
        kernels
    };
    // SAFETY: kernels of that module.
    kernels.into_iter().try_for_each(|kernel| unsafe { sys::cuFuncLoad(kernel) }.result())
}
