//! [`Loader`]: builds a model on a [`Checkpoint`] and says everything that does not fit, at once.

use super::Checkpoint;
use crate::LoadError;
use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::init::Init;
use candle_nn::var_builder::SimpleBackend;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

/// Where a file keeps a tensor of the model, or a piece of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The file's name.
    name: String,
    /// Which of how many equal parts along the first axis.
    part: (usize, usize),
}

impl Source {
    /// The `i`-th of `n` equal parts along the first axis: one of several projections that the file keeps as one.
    pub fn part(name: impl Into<String>, i: usize, n: usize) -> Self {
        Self { name: name.into(), part: (i, n) }
    }

    /// The same with something before the file's name.
    pub fn prefixed(self, prefix: &str) -> Self {
        Self { name: format!("{prefix}{}", self.name), ..self }
    }

    /// The part's shape, if the tensor can be cut so.
    fn shape(&self, whole: &[usize]) -> Option<Vec<usize>> {
        let mut shape = whole.to_vec();
        if self.part.1 > 1 {
            let rows = shape.first_mut().filter(|rows| rows.is_multiple_of(self.part.1))?;
            *rows /= self.part.1;
        }
        Some(shape)
    }
}

impl From<String> for Source {
    fn from(name: String) -> Self {
        Self { name, part: (0, 1) }
    }
}

/// Gives a model the tensors of a checkpoint: frozen, each read once, when the model asks for it.
///
/// A tensor that is missing or has another shape does not stop the model from being built: it becomes a placeholder,
/// and [`Loader::finish`] reports it with all others. Until `finish` has agreed, the model must not be used.
#[derive(Clone)]
pub struct Loader {
    shared: Arc<Shared>,
}

/// Where the file has a tensor of the model.
type Names = dyn Fn(&str) -> Vec<Source> + Send + Sync;

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
    /// A loader that finds each tensor of the model where `names` says: usually under one name; several are put together
    /// along their first axis (three projections that the model keeps as one), see also [`Source::part`].
    ///
    /// Shapes may differ by axes of length 1: `[C]` in the model is `[1, C, 1]` in some files.
    pub fn new<S: Into<Source>>(
        checkpoint: Checkpoint,
        names: impl Fn(&str) -> Vec<S> + Send + Sync + 'static,
    ) -> Self {
        let names = move |name: &str| names(name).into_iter().map(Into::into).collect();
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
        let mut state = self.state();
        let (mut shapes, mut whole) = (vec![], vec![]);
        for source in &sources {
            state.used.insert(source.name.clone());
            match checkpoint.shape(&source.name) {
                Some(shape) => {
                    shapes.push(source.shape(shape));
                    whole.push(shape.to_vec());
                }
                None if state.missing.contains(&source.name) => {}
                None => state.missing.push(source.name.clone()),
            }
        }
        if shapes.len() < sources.len() {
            return Ok(None);
        }
        let found = stacked(&shapes);
        let fits = |found: &[usize]| want.is_none_or(|want| without_ones(want.dims()) == without_ones(found));
        let Some(found) = found.filter(|found| fits(found)) else {
            let want = want.map(Shape::dims).unwrap_or_default();
            for ((source, shape), whole) in sources.iter().zip(&shapes).zip(whole) {
                let mut part = want.to_vec();
                if let (true, Some(rows)) = (sources.len() > 1, part.first_mut()) {
                    *rows /= sources.len();
                }
                if shape.as_ref().is_none_or(|shape| *shape != part) {
                    if let Some(rows) = part.first_mut() {
                        *rows *= source.part.1;
                    }
                    state.misshapen.push((source.name.clone(), part, whole));
                }
            }
            return Ok(None);
        };
        drop(state);
        let read = |source: &Source| {
            checkpoint.read_part(&source.name, source.part, dtype, device).map_err(|e| {
                let path = checkpoint.path().display();
                Error::Msg(format!("checkpoint `{path}`: tensor `{}`: {e}", source.name))
            })
        };
        let tensor = match sources.as_slice() {
            [one] => read(one)?,
            several => Tensor::cat(&several.iter().map(read).collect::<Result<Vec<_>>>()?, 0)?,
        };
        let tensor = match want {
            Some(want) if want.dims() != found => tensor.reshape(want)?,
            _ => tensor,
        };
        self.state().tensors.insert(name.to_string(), tensor.clone());
        Ok(Some(tensor))
    }
}

/// The shape of pieces put together along their first axis, if they fit each other.
fn stacked(pieces: &[Option<Vec<usize>>]) -> Option<Vec<usize>> {
    let pieces: Vec<&Vec<usize>> = pieces.iter().map(Option::as_ref).collect::<Option<_>>()?;
    let mut shape = pieces.first()?.to_vec();
    if pieces.len() > 1 {
        if pieces.iter().any(|piece| piece.is_empty() || piece[1..] != shape[1..]) {
            return None;
        }
        shape[0] = pieces.iter().map(|piece| piece[0]).sum();
    }
    Some(shape)
}

fn without_ones(shape: &[usize]) -> Vec<usize> {
    shape.iter().copied().filter(|&n| n != 1).collect()
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
        (self.shared.names)(name).iter().all(|source| self.shared.checkpoint.shape(&source.name).is_some())
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
    fn a_part_of_a_tensor_and_a_shape_with_ones_are_read() {
        let (_dir, checkpoint) = checkpoint(&[("a.qkv", &[6, 2]), ("alpha", &[1, 3, 1]), ("odd", &[5])]);
        let loader = Loader::new(checkpoint, |name| match name.split_once(".to_") {
            Some((stem, "k")) => vec![Source::part(format!("{stem}.qkv"), 1, 3)],
            _ if name == "third" => vec![Source::part("odd", 2, 3)],
            _ => vec![Source::from(name.to_string())],
        });
        let vb = loader.builder(DType::F32, &CPU);
        let k = vb.get((2, 2), "a.to_k").unwrap();
        assert_eq!(k.to_vec2::<f32>().unwrap(), [[4., 5.], [6., 7.]]);
        assert_eq!(vb.get(3, "alpha").unwrap().to_vec1::<f32>().unwrap(), [12., 13., 14.]);
        loader.finish(|name| name == "odd").unwrap();
        vb.get(2, "third").unwrap();
        let message = loader.finish(|_| false).unwrap_err().to_string();
        assert!(message.contains("`odd`: expected [6], found [5]"), "{message}");
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
