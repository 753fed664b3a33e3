//! [`Loader`]: builds a model on a [`Checkpoint`] and says everything that does not fit, at once.

use super::Checkpoint;
use crate::LoadError;
use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::init::Init;
use candle_nn::var_builder::SimpleBackend;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

/// Gives a model the tensors of a checkpoint: frozen, each read once, when the model asks for it.
///
/// A tensor that is missing or has another shape does not stop the model from being built: it becomes a placeholder,
/// and [`Loader::finish`] reports it with all others. Until `finish` has agreed, the model must not be used.
#[derive(Clone)]
pub struct Loader {
    shared: Arc<Shared>,
}

/// The file's names of a tensor of the model.
type Names = dyn Fn(&str) -> Vec<String> + Send + Sync;

struct Shared {
    checkpoint: Checkpoint,
    names: Box<Names>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What the model got, by the model's names.
    tensors: BTreeMap<String, Tensor>,
    /// What it asked for, by the file's names.
    used: BTreeSet<String>,
    missing: Vec<String>,
    misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl Loader {
    /// A loader that finds each tensor of the model under the names that `names` gives: usually one; several are
    /// put together along their first axis (three projections that the model keeps as one).
    pub fn new(checkpoint: Checkpoint, names: impl Fn(&str) -> Vec<String> + Send + Sync + 'static) -> Self {
        let (names, state) = (Box::new(names), Mutex::default());
        Self { shared: Arc::new(Shared { checkpoint, names, state }) }
    }

    /// A loader of a checkpoint that has the model's own names.
    pub fn same_names(checkpoint: Checkpoint) -> Self {
        Self::new(checkpoint, |name| vec![name.to_string()])
    }

    /// What the model is built from.
    pub fn builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.shared.checkpoint
    }

    /// Says whether checkpoint and model fit; gives the model's tensors by its own names.
    ///
    /// `unneeded` tells which names of the file a model may leave unread.
    ///
    /// # Errors
    /// If tensors are missing, misshapen, or left over and not `unneeded`: all of them, by the file's names.
    pub fn finish(
        &self,
        unneeded: impl Fn(&str) -> bool,
    ) -> std::result::Result<BTreeMap<String, Tensor>, LoadError> {
        let state = self.state();
        let unused: Vec<String> = self
            .shared
            .checkpoint
            .names()
            .filter(|name| !state.used.contains(*name) && !unneeded(name))
            .map(str::to_string)
            .collect();
        if !(state.missing.is_empty() && state.misshapen.is_empty() && unused.is_empty()) {
            let (path, missing) = (self.shared.checkpoint.path().to_path_buf(), state.missing.clone());
            return Err(LoadError::Mismatch { path, missing, unused, misshapen: state.misshapen.clone() });
        }
        Ok(state.tensors.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held leaves whole entries.
        self.shared.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Reads the tensor `name` of the model; `want` is its shape, or none to take the file's.
    fn load(
        &self,
        want: Option<&Shape>,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Option<Tensor>> {
        if let Some(tensor) = self.state().tensors.get(name) {
            return Ok(Some(tensor.clone()));
        }
        let checkpoint = &self.shared.checkpoint;
        let sources = (self.shared.names)(name);
        let mut rows = 0;
        let mut shapes = vec![];
        let mut state = self.state();
        for source in &sources {
            state.used.insert(source.clone());
            match checkpoint.shape(source) {
                Some(shape) => {
                    rows += shape.first().copied().unwrap_or(0);
                    shapes.push(shape.to_vec());
                }
                None => state.missing.push(source.clone()),
            }
        }
        if shapes.len() < sources.len() {
            return Ok(None);
        }
        let mut found = shapes.first().cloned().unwrap_or_default();
        let agree = shapes.iter().all(|shape| shape.get(1..) == found.get(1..));
        if shapes.len() > 1 && agree && !found.is_empty() {
            found[0] = rows;
        }
        if let Some(want) = want.filter(|want| want.dims() != found || !agree) {
            for (source, shape) in sources.iter().zip(&shapes) {
                let mut part = want.dims().to_vec();
                if let (true, Some(rows)) = (sources.len() > 1, part.first_mut()) {
                    *rows /= sources.len();
                }
                if part != *shape {
                    state.misshapen.push((source.clone(), part, shape.clone()));
                }
            }
            return Ok(None);
        }
        drop(state);
        let read = |source: &String| {
            checkpoint.read(source, dtype, device).map_err(|e| {
                Error::Msg(format!("checkpoint `{}`: tensor `{source}`: {e}", checkpoint.path().display()))
            })
        };
        let tensor = match sources.as_slice() {
            [one] => read(one)?,
            several => Tensor::cat(&several.iter().map(read).collect::<Result<Vec<_>>>()?, 0)?,
        };
        self.state().tensors.insert(name.to_string(), tensor.clone());
        Ok(Some(tensor))
    }
}

impl SimpleBackend for Loader {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        match self.load(Some(&shape), name, dtype, device)? {
            Some(tensor) if tensor.shape() == &shape => Ok(tensor),
            Some(tensor) => Err(Error::UnexpectedShape {
                msg: format!("the model asks for `{name}` twice, in two shapes"),
                expected: shape,
                got: tensor.shape().clone(),
            }),
            // A placeholder without memory.
            None => Tensor::zeros((), dtype, device)?.broadcast_as(shape),
        }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.load(None, name, dtype, device)?
            .ok_or_else(|| Error::CannotFindTensor { path: name.to_string() })
    }

    fn contains_tensor(&self, name: &str) -> bool {
        (self.shared.names)(name).iter().all(|source| self.shared.checkpoint.shape(source).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write_safetensors;

    const CPU: Device = Device::Cpu;

    fn checkpoint(names: &[(&str, &[usize])]) -> (tempfile::TempDir, Checkpoint) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        let mut first = 0.0;
        let mut tensors = BTreeMap::new();
        for (name, shape) in names {
            let n: usize = shape.iter().product();
            let values = Tensor::arange(first, first + n as f32, &CPU).unwrap();
            tensors.insert(name.to_string(), values.reshape(*shape).unwrap());
            first += n as f32;
        }
        write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
        let opened = Checkpoint::open(&path).unwrap();
        (dir, opened)
    }

    fn theirs(name: &str) -> Vec<String> {
        match name.strip_suffix("qkv") {
            Some(stem) => ["q", "k", "v"].map(|part| format!("{stem}{part}")).into(),
            None => vec![name.to_string()],
        }
    }

    #[test]
    fn three_projections_become_one_and_unneeded_ones_are_left() {
        let (_dir, checkpoint) =
            checkpoint(&[("a.q", &[1, 2]), ("a.k", &[1, 2]), ("a.v", &[1, 2]), ("a.position_ids", &[3])]);
        let loader = Loader::new(checkpoint, theirs);
        let vb = loader.builder(DType::F32, &CPU);
        let qkv = vb.pp("a").get((3, 2), "qkv").unwrap();
        assert_eq!(qkv.to_vec2::<f32>().unwrap(), [[0., 1.], [2., 3.], [4., 5.]]);
        assert_eq!(vb.pp("a").get((3, 2), "qkv").unwrap().id(), qkv.id());
        let tensors = loader.finish(|name| name.ends_with("position_ids")).unwrap();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a.qkv"]);
        let message = loader.finish(|_| false).unwrap_err().to_string();
        assert!(message.contains("`a.position_ids`: not used"), "{message}");
    }

    #[test]
    fn everything_that_does_not_fit_is_listed_at_once() {
        let (_dir, checkpoint) = checkpoint(&[("a.q", &[1, 2]), ("a.k", &[1, 3]), ("b", &[4]), ("c", &[1])]);
        let loader = Loader::new(checkpoint, theirs);
        let vb = loader.builder(DType::F32, &CPU);
        assert_eq!(vb.get((3, 2), "a.qkv").unwrap().dims(), [3, 2]);
        vb.get(5, "b").unwrap();
        vb.get(5, "d").unwrap();
        let message = loader.finish(|_| false).unwrap_err().to_string();
        for part in ["`a.v`: missing", "`d`: missing", "`c`: not used", "`b`: expected [5], found [4]"] {
            assert!(message.contains(part), "{message}");
        }
        assert!(message.contains("missing 2, not used 1, of another shape 1"), "{message}");
    }

    #[test]
    fn another_models_file_is_said_to_be_one_and_the_list_stays_readable() {
        let names: Vec<(String, Vec<usize>)> = (0..100).map(|i| (format!("x.{i}"), vec![1])).collect();
        let loader = Loader::same_names(Checkpoint::without_data(names));
        let vb = loader.builder(DType::F32, &CPU);
        for i in 0..50 {
            vb.get(1, &format!("y.{i}")).unwrap();
        }
        let message = loader.finish(|_| false).unwrap_err().to_string();
        assert!(message.contains("hint: ") && message.contains("another model"), "{message}");
        assert!(message.contains("and 80 more") && message.lines().count() < 50, "{message}");
    }
}
