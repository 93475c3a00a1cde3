//! HDF5, and the only file that names it: skeletons of shard files (everything but the numbers) and the index of virtual
//! datasets. Both are made in nameless files of `TMPDIR` (else /dev/shm, else /tmp; sparse where the numbers will be) and
//! handed on open, so that what reaches the disk goes through plain sequential writes: I/O errors come back as such,
//! checksums are taken from memory, and HDF5 neither locks nor caches anything on the parallel file system. It knows
//! nothing of models or ranks.
//!
//! bf16 is a true float type of 1 sign, 8 exponent and 7 mantissa bits, so h5py and h5ls show numbers.

use crate::error::{Error, IoContext, Kind, Result, wrong_hdf5};
use crate::fault;
use crate::parallel::slice::Slice;
use crate::tensor::DType;
use hdf5_sys::h5::hsize_t;
use hdf5_sys::h5i::hid_t;
use hdf5_sys::{h5a, h5d, h5f, h5p, h5s, h5t};
use std::ffi::{CString, c_void};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::ptr::null;

/// A dataset of a shard file.
pub struct Dataset {
    /// Path in the file, e.g. `weights/embedding.weight`.
    pub path: String,
    /// Element type.
    pub dtype: DType,
    /// Shape of the whole tensor, kept as an attribute.
    pub global_shape: Vec<usize>,
    /// Which part of it this is; `slice.shape` is the shape of the dataset.
    pub slice: Slice,
}

/// Where a part of a virtual dataset lies.
pub struct Source {
    /// File name, relative to the index.
    pub file: String,
    /// Path of the dataset in that file.
    pub path: String,
    /// Which part of the whole tensor it is.
    pub slice: Slice,
}

/// A dataset of the index: a whole tensor, put together from the shards when it is read.
pub struct Virtual {
    /// Path in the index, e.g. `weights/embedding.weight`.
    pub path: String,
    /// Element type.
    pub dtype: DType,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Its parts; together they cover it.
    pub sources: Vec<Source>,
}

/// An attribute of the root of the index.
pub enum Attribute {
    /// A number.
    Number(u64),
    /// UTF-8 text.
    Text(String),
}

/// A shard file without its numbers: an open file of the final size, and for each dataset the byte at which its
/// contiguous values belong.
pub fn skeleton(datasets: &[Dataset]) -> Result<(File, Vec<u64>)> {
    build(|file| datasets.iter().map(|dataset| create_contiguous(file, dataset)).collect())
}

/// The index file: every tensor whole, as a virtual dataset, and attributes of its root.
pub fn index(tensors: &[Virtual], attributes: &[(&str, Attribute)]) -> Result<File> {
    let (file, ()) = build(|file| {
        for (name, value) in attributes {
            match value {
                Attribute::Number(number) => write_numbers(file, name, &[*number], Extent::Scalar)?,
                Attribute::Text(text) => write_text(file, name, text)?,
            }
        }
        tensors.iter().try_for_each(|tensor| create_virtual(file, tensor))
    })?;
    Ok(file)
}

/// Lets HDF5 write a file that has no name from the moment HDF5 holds it open: a job that is killed leaves nothing, and what
/// another left is not in the way.
fn build<T>(fill: impl FnOnce(&Id) -> Result<T>) -> Result<(File, T)> {
    let dir = match std::env::var_os("TMPDIR") {
        Some(dir) => PathBuf::from(dir),
        None if Path::new("/dev/shm").is_dir() => PathBuf::from("/dev/shm"),
        None => PathBuf::from("/tmp"),
    };
    let room = || format!("make room in {}, or set TMPDIR to a directory with room", dir.display());
    let built = hdf5::sync::sync(|| {
        fault::io("io.hdf5").at(&dir)?;
        let (file, path) = tempfile::Builder::new().prefix("trireme-").suffix(".h5").tempfile_in(&dir).at(&dir)?.into_parts();
        let h5 = create_file(&path)?;
        path.close().at(&dir)?;
        let value = fill(&h5)?;
        fault::io("io.hdf5").at(&dir)?;
        close_file(h5)?;
        Ok((file, value))
    });
    built.map_err(|error: Error| error.remedy(room()))
}

/// An HDF5 identifier, closed when dropped.
struct Id {
    id: hid_t,
    close: unsafe extern "C" fn(hid_t) -> i32,
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: `id` is a live identifier of the kind that `close` closes, made by `own`, and closed once.
        unsafe { (self.close)(self.id) };
    }
}

/// Takes over an identifier that a call returned, or tells what the library says went wrong.
fn own(id: hid_t, close: unsafe extern "C" fn(hid_t) -> i32, what: &str) -> Result<Id> {
    check(id, what)?;
    Ok(Id { id, close })
}

fn check(status: hid_t, what: &str) -> Result<()> {
    if status >= 0 {
        return Ok(());
    }
    let cause = hdf5::Error::query().map_or_else(|error| error.to_string(), |error| error.to_string());
    Err(Error::new(Kind::File, format!("HDF5 could not {what}: {}", wrong_hdf5(&cause))))
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("names have no NUL byte")
}

fn sizes(shape: &[usize]) -> Vec<hsize_t> {
    shape.iter().map(|&n| n as hsize_t).collect()
}

/// `path` exists and is empty: HDF5 writes into that very file, which stays open elsewhere.
fn create_file(path: &Path) -> Result<Id> {
    let path = c_string(path.to_str().ok_or_else(|| Error::new(Kind::File, "its name is not UTF-8"))?);
    // SAFETY: the path is a NUL-terminated string; default property lists.
    let id = unsafe { h5f::H5Fcreate(path.as_ptr(), h5f::H5F_ACC_TRUNC, h5p::H5P_DEFAULT, h5p::H5P_DEFAULT) };
    own(id, h5f::H5Fclose, "create a file")
}

/// Closes by hand, because what `drop` does cannot fail.
fn close_file(file: Id) -> Result<()> {
    let id = file.id;
    std::mem::forget(file);
    // SAFETY: the identifier is alive; forgotten above, so it is closed once.
    check(unsafe { h5f::H5Fclose(id) }.into(), "close a file")
}

fn create_contiguous(file: &Id, dataset: &Dataset) -> Result<u64> {
    let properties = create_dataset_properties()?;
    // SAFETY: a live dataset-creation property list.
    let status = unsafe {
        h5p::H5Pset_layout(properties.id, h5d::H5D_layout_t::H5D_CONTIGUOUS)
            .min(h5p::H5Pset_alloc_time(properties.id, h5d::H5D_alloc_time_t::H5D_ALLOC_TIME_EARLY))
            .min(h5p::H5Pset_fill_time(properties.id, h5d::H5D_fill_time_t::H5D_FILL_TIME_NEVER))
    };
    check(status.into(), "set the layout of a dataset")?;
    let space = create_space(&dataset.slice.shape)?;
    let made = create_dataset(file, &dataset.path, dataset.dtype, (&space, &properties))?;
    write_numbers(&made, "global_shape", &sizes(&dataset.global_shape), Extent::List)?;
    write_numbers(&made, "slice_offset", &sizes(&dataset.slice.offset), Extent::List)?;
    // SAFETY: a live dataset.
    let offset = unsafe { h5d::H5Dget_offset(made.id) };
    assert_ne!(offset, u64::MAX, "a contiguous dataset allocated early has an address");
    Ok(offset)
}

fn create_virtual(file: &Id, tensor: &Virtual) -> Result<()> {
    let properties = create_dataset_properties()?;
    let whole = create_space(&tensor.shape)?;
    for source in &tensor.sources {
        let (start, count) = (sizes(&source.slice.offset), sizes(&source.slice.shape));
        let op = h5s::H5S_seloper_t::H5S_SELECT_SET;
        // SAFETY: a live dataspace whose rank is the length of `start` and `count`; null stride and block mean 1.
        let status = unsafe { h5s::H5Sselect_hyperslab(whole.id, op, start.as_ptr(), null(), count.as_ptr(), null()) };
        check(status.into(), "select a part of a tensor")?;
        let part = create_space(&source.slice.shape)?;
        let (file_name, path) = (c_string(&source.file), c_string(&source.path));
        // SAFETY: live identifiers and NUL-terminated strings; HDF5 copies them all.
        let status = unsafe { h5p::H5Pset_virtual(properties.id, whole.id, file_name.as_ptr(), path.as_ptr(), part.id) };
        check(status.into(), "map a part of a tensor")?;
    }
    let space = create_space(&tensor.shape)?;
    create_dataset(file, &tensor.path, tensor.dtype, (&space, &properties)).map(drop)
}

fn create_dataset(file: &Id, path: &str, dtype: DType, (space, properties): (&Id, &Id)) -> Result<Id> {
    let links = create_properties(*hdf5::globals::H5P_LINK_CREATE)?;
    // SAFETY: a live link-creation property list.
    check(unsafe { h5p::H5Pset_create_intermediate_group(links.id, 1) }.into(), "make groups")?;
    let (element, name) = (element_type(dtype)?, c_string(path));
    // SAFETY: live identifiers and a NUL-terminated string.
    let id = unsafe { h5d::H5Dcreate2(file.id, name.as_ptr(), element.id, space.id, links.id, properties.id, h5p::H5P_DEFAULT) };
    own(id, h5d::H5Dclose, &format!("create the dataset {path}"))
}

/// Of a dataset. Without the times of its making: equal contents are equal bytes.
fn create_dataset_properties() -> Result<Id> {
    let properties = create_properties(*hdf5::globals::H5P_DATASET_CREATE)?;
    // SAFETY: a live object-creation property list.
    check(unsafe { h5p::H5Pset_obj_track_times(properties.id, 0) }.into(), "leave out times")?;
    Ok(properties)
}

fn create_properties(class: hid_t) -> Result<Id> {
    // SAFETY: `class` is one of the library's own property list classes.
    own(unsafe { h5p::H5Pcreate(class) }, h5p::H5Pclose, "create a property list")
}

fn create_space(shape: &[usize]) -> Result<Id> {
    let dims = sizes(shape);
    // SAFETY: `dims` has as many entries as the rank says; a null maximum means the same extents.
    own(unsafe { h5s::H5Screate_simple(dims.len() as i32, dims.as_ptr(), null()) }, h5s::H5Sclose, "create a dataspace")
}

/// f32 and u32 little-endian; bf16 as the upper half of an f32: sign at bit 15, exponent 7..15 with bias 127, mantissa 0..7.
fn element_type(dtype: DType) -> Result<Id> {
    let base = match dtype {
        DType::F32 | DType::BF16 => *hdf5::globals::H5T_IEEE_F32LE,
        DType::U32 => *hdf5::globals::H5T_STD_U32LE,
        DType::F8E4M3 => unreachable!("checkpoints keep weights as they were before they were quantised"),
    };
    // SAFETY: `base` is one of the library's own types.
    let copy = own(unsafe { h5t::H5Tcopy(base) }, h5t::H5Tclose, "copy a type")?;
    if dtype == DType::BF16 {
        // SAFETY: a live, modifiable copy. The fields come first: they must lie within the type at every moment.
        let status =
            unsafe { h5t::H5Tset_fields(copy.id, 15, 7, 8, 0, 7).min(h5t::H5Tset_size(copy.id, 2)).min(h5t::H5Tset_ebias(copy.id, 127)) };
        check(status.into(), "make the bf16 type")?;
    }
    Ok(copy)
}

#[derive(Clone, Copy)]
enum Extent {
    Scalar,
    List,
}

fn write_numbers(object: &Id, name: &str, numbers: &[u64], extent: Extent) -> Result<()> {
    let space = match extent {
        Extent::Scalar => create_scalar()?,
        Extent::List => create_space(&[numbers.len()])?,
    };
    // SAFETY: one of the library's own types.
    let element = own(unsafe { h5t::H5Tcopy(*hdf5::globals::H5T_STD_U64LE) }, h5t::H5Tclose, "copy a type")?;
    write_attribute(object, name, (&element, &space), numbers.as_ptr().cast())
}

fn write_text(object: &Id, name: &str, text: &str) -> Result<()> {
    // SAFETY: one of the library's own types.
    let element = own(unsafe { h5t::H5Tcopy(*hdf5::globals::H5T_C_S1) }, h5t::H5Tclose, "copy a type")?;
    // SAFETY: a live, modifiable copy; the size is at least 1.
    let status =
        unsafe { h5t::H5Tset_size(element.id, text.len().max(1)).min(h5t::H5Tset_cset(element.id, h5t::H5T_cset_t::H5T_CSET_UTF8)) };
    check(status.into(), "make a text type")?;
    let padded = c_string(text);
    write_attribute(object, name, (&element, &create_scalar()?), padded.as_ptr().cast())
}

fn create_scalar() -> Result<Id> {
    // SAFETY: no pointers.
    own(unsafe { h5s::H5Screate(h5s::H5S_class_t::H5S_SCALAR) }, h5s::H5Sclose, "create a dataspace")
}

/// `values` points at as many elements of the type as the space has.
fn write_attribute(object: &Id, name: &str, (element, space): (&Id, &Id), values: *const c_void) -> Result<()> {
    let label = c_string(name);
    // SAFETY: live identifiers and a NUL-terminated string.
    let id = unsafe { h5a::H5Acreate2(object.id, label.as_ptr(), element.id, space.id, h5p::H5P_DEFAULT, h5p::H5P_DEFAULT) };
    let attribute = own(id, h5a::H5Aclose, &format!("create the attribute {name}"))?;
    // SAFETY: the callers pass as many values as type and space say.
    check(unsafe { h5a::H5Awrite(attribute.id, element.id, values) }.into(), "write an attribute")
}
