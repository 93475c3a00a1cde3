//! Seen by a reader that knows nothing of us.

use crate::oracles;
use crate::parts::*;
use std::collections::BTreeMap;
use trireme::comm::threads;
use trireme::model::config::ModelConfig;
use trireme::parallel::layout::ParallelLayout;

/// h5py, which knows nothing of us, sees every tensor whole under its name with the right numbers: the point of the virtual
/// datasets. bf16 is a 2-byte float that it reads as float32. The working directory does not matter.
#[test]
fn h5py_sees_whole_tensors() {
    let Some(python) = oracles::python("h5py, numpy") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (out, dump) = (dir.path().join("step-00000003"), dir.path().join("dump"));
    std::fs::create_dir(&dump).unwrap();
    let layout = ParallelLayout { tp: 2, pp: 2, dp: 3, vp: 1 };
    threads::run(layout.world(), |world| {
        let parts = held(&model(false), &layout, world.rank());
        save_parts(&out, &meta(model(false), layout, 3), &parts, 5, &*world).unwrap();
    });
    let lines = oracles::run(&python, "h5py_dump.py", &[&out.join("index.h5"), &dump]);
    let attributes: BTreeMap<&str, &str> =
        lines.iter().filter(|line| line[0] == "attribute").map(|line| (line[1].as_str(), line[2].as_str())).collect();
    assert_eq!((attributes["step"], attributes["consumed_samples"]), ("3", "24"));
    assert_eq!(serde_json::from_str::<ModelConfig>(attributes["model"]).unwrap(), model(false));
    assert_eq!(serde_json::from_str::<ParallelLayout>(attributes["layout"]).unwrap(), layout);
    let seen: Vec<&Vec<String>> = lines.iter().filter(|line| line[0] == "dataset").collect();
    let parts: BTreeMap<String, Part> = all_parts().into_iter().map(|part| (part.name.clone(), part)).collect();
    assert_eq!(seen.len(), parts.len());
    for (n, line) in seen.into_iter().enumerate() {
        let part = &parts[&line[1]];
        let shape: Vec<String> = part.shape.iter().map(usize::to_string).collect();
        let bytes = part.dtype.bytes().to_string();
        assert_eq!(line[2..], [shape.join(","), "float32".into(), bytes, "True".into()], "{}", part.name);
        let found: Vec<u32> = oracles::read_f32(&dump.join(format!("{n}.bin"))).into_iter().map(f32::to_bits).collect();
        let expected: Vec<u32> = (0..found.len()).map(|i| truth(5, &part.name, i, part.dtype)).collect();
        assert!(found == expected, "{}", part.name);
    }
}
