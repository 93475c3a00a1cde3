//! Matrices as the copy engine of a Hopper GPU takes them: encoded by the driver once an address and shape. Knows nothing of
//! operations.

use super::backend::TensorMap;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

/// Most matrices that are kept; memory is reused, so there are few addresses at a time.
const MOST_KEPT: usize = 4096;

/// Those that were encoded.
#[derive(Default)]
pub struct TensorMaps(Mutex<HashMap<TensorMap, sys::CUtensorMap>>);

impl TensorMaps {
    /// The matrix in the driver's form. Panics with the matrix when the driver refuses it.
    pub fn encoded(&self, map: TensorMap) -> sys::CUtensorMap {
        let mut kept = self.0.lock().expect("no panic while holding the matrices");
        if let Some(encoded) = kept.get(&map) {
            return *encoded;
        }
        let encoded = encode(map);
        if kept.len() == MOST_KEPT {
            kept.clear();
        }
        kept.insert(map, encoded);
        encoded
    }
}

/// bf16, `(dim, head, token)` with the dims innermost, boxes of 64 dims of one head, swizzled over 128 bytes, zeros outside.
fn encode(map: TensorMap) -> sys::CUtensorMap {
    let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
    let sizes = [map.dim, map.heads, map.tokens].map(|n| n as u64);
    let strides = map.strides();
    let boxes = [TensorMap::BOX_DIMS as u32, 1, map.box_tokens];
    // SAFETY: arrays of the rank that is given, `strides` of one less; all are read during the call, which writes one struct.
    let refused = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut encoded,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            sizes.len() as u32,
            map.address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            [1u32; 3].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    assert!(refused == sys::CUresult::CUDA_SUCCESS, "encoding {map:?} for the copy engine: {refused:?}");
    encoded
}
