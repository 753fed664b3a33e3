//! Named trainable variables behind a [`VarBuilder`]: seeded initialisation, loading, saving, copying.

use crate::{Rng, write_safetensors};
use candle_core::{DType, Device, Error, Result, Shape, Tensor, Var};
use candle_nn::VarBuilder;
use candle_nn::init::{Init, NormalOrUniform};
use candle_nn::var_builder::SimpleBackend;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// Trainable variables by name. Clones share the variables; [`Params::deep_clone`] copies them.
///
/// A model built from [`Params::builder`] creates its variables as it asks for them. The noise of each is keyed by
/// (seed, name), so it depends neither on the order of creation nor on what else the model holds.
#[derive(Clone)]
pub struct Params {
    seed: u64,
    vars: Arc<Mutex<BTreeMap<String, Var>>>,
}

/// Why a checkpoint could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is missing, unreadable or no safetensors file.
    #[error("cannot read checkpoint `{path}`: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        source: Box<Error>,
    },
    /// Names or shapes differ; every difference is listed.
    #[error("{}", mismatch_message(.path, .missing, .unused, .misshapen))]
    Mismatch {
        /// The file, or a description of where the tensors came from.
        path: PathBuf,
        /// Variables without a tensor.
        missing: Vec<String>,
        /// Tensors without a variable.
        unused: Vec<String>,
        /// Name, shape of the variable, shape found.
        misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
    },
    /// A tensor could not be converted or copied.
    #[error("checkpoint `{path}`: tensor `{name}`: {source}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What candle said.
        source: Box<Error>,
    },
}

/// Lines of one kind in a message: more say nothing new.
const MAX_LINES: usize = 20;

fn mismatch_message(
    path: &Path,
    missing: &[String],
    unused: &[String],
    misshapen: &[(String, Vec<usize>, Vec<usize>)],
) -> String {
    let mut out = format!(
        "checkpoint `{}` does not fit this config (tensors missing {}, not used {}, of another shape {})",
        path.display(),
        missing.len(),
        unused.len(),
        misshapen.len()
    );
    let mut list = |lines: Vec<String>| {
        for line in lines.iter().take(MAX_LINES) {
            let _ = write!(out, "\n  tensor {line}");
        }
        if let Some(more) = lines.len().checked_sub(MAX_LINES + 1) {
            let _ = write!(out, "\n  and {} more", more + 1);
        }
    };
    list(missing.iter().map(|name| format!("`{name}`: missing")).collect());
    list(unused.iter().map(|name| format!("`{name}`: not used by the model")).collect());
    let shapes = |(name, want, got): &(String, Vec<usize>, Vec<usize>)| {
        format!("`{name}`: expected {want:?}, found {got:?}")
    };
    list(misshapen.iter().map(shapes).collect());
    if missing.len() > MAX_LINES && unused.len() > MAX_LINES {
        out += "\nhint: is it a checkpoint of another model?";
    }
    out
}

impl Params {
    /// No variables yet; those created later take their noise from `seed` and their name.
    pub fn new(seed: u64) -> Params {
        Params { seed, vars: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Var>> {
        // A panic while the lock is held leaves a map that is still whole: entries are inserted in one step.
        self.vars.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Variables with the names and values of `tensors`, which are copied.
    ///
    /// # Errors
    /// If a copy fails.
    pub fn of<'a>(tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>) -> Result<Params> {
        let vars =
            tensors.into_iter().map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(&tensor.detach())?)));
        Ok(Params { seed: 0, vars: Arc::new(Mutex::new(vars.collect::<Result<_>>()?)) })
    }

    /// A builder that hands out these variables, creating each on its first `get`.
    pub fn builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// Every variable with its name, sorted by name.
    pub fn names_and_vars(&self) -> Vec<(String, Var)> {
        self.lock().iter().map(|(n, v)| (n.clone(), v.clone())).collect()
    }

    /// The variable called `name`.
    pub fn get(&self, name: &str) -> Option<Var> {
        self.lock().get(name).cloned()
    }

    /// Number of scalars in all variables.
    pub fn len_params(&self) -> usize {
        self.lock().values().map(|v| v.elem_count()).sum()
    }

    /// Fills the variables from a safetensors file of any float dtype.
    ///
    /// # Errors
    /// If the file cannot be read, or names or shapes differ; all differences are listed at once and no variable
    /// is changed.
    pub fn load(&self, path: impl AsRef<Path>) -> std::result::Result<(), LoadError> {
        let path = path.as_ref();
        let tensors = candle_core::safetensors::load(path, &Device::Cpu)
            .map_err(|source| LoadError::Unreadable { path: path.to_path_buf(), source: source.into() })?;
        self.fill(&tensors, "", path)
    }

    /// Fills the variables from the tensors whose names are `prefix` followed by the variable's name.
    /// Tensors without the prefix are ignored.
    ///
    /// # Errors
    /// If names or shapes differ; all differences are listed at once and no variable is changed.
    pub fn load_tensors(
        &self,
        tensors: &HashMap<String, Tensor>,
        prefix: &str,
    ) -> std::result::Result<(), LoadError> {
        self.fill(tensors, prefix, Path::new("tensors in memory"))
    }

    pub(crate) fn fill(
        &self,
        tensors: &HashMap<String, Tensor>,
        prefix: &str,
        path: &Path,
    ) -> std::result::Result<(), LoadError> {
        let vars = self.names_and_vars();
        let (mut missing, mut misshapen) = (Vec::new(), Vec::new());
        for (name, var) in &vars {
            match tensors.get(&format!("{prefix}{name}")) {
                None => missing.push(format!("{prefix}{name}")),
                Some(t) if t.dims() != var.dims() => {
                    misshapen.push((format!("{prefix}{name}"), var.dims().to_vec(), t.dims().to_vec()));
                }
                Some(_) => {}
            }
        }
        let mut unused: Vec<String> = tensors
            .keys()
            .filter(|n| n.strip_prefix(prefix).is_some_and(|rest| self.get(rest).is_none()))
            .cloned()
            .collect();
        unused.sort();
        if !(missing.is_empty() && unused.is_empty() && misshapen.is_empty()) {
            return Err(LoadError::Mismatch { path: path.to_path_buf(), missing, unused, misshapen });
        }
        for (name, var) in &vars {
            let full = format!("{prefix}{name}");
            tensors[&full]
                .to_device(var.device())
                .and_then(|t| t.to_dtype(var.dtype()))
                .and_then(|t| assign(var, &t))
                .map_err(|source| LoadError::Tensor {
                    path: path.to_path_buf(),
                    name: full,
                    source: source.into(),
                })?;
        }
        Ok(())
    }

    /// The variables' values by name, detached; the tensors are copies.
    ///
    /// # Errors
    /// If a copy fails.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        self.names_and_vars()
            .into_iter()
            .map(|(name, var)| Ok((name, var.as_tensor().detach().copy()?)))
            .collect()
    }

    /// Writes the variables as `dtype` to a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>, dtype: DType) -> Result<()> {
        let mut tensors = BTreeMap::new();
        for (name, var) in self.names_and_vars() {
            tensors.insert(name, var.as_tensor().detach().to_dtype(dtype)?);
        }
        write_safetensors(path, &tensors, &BTreeMap::new())
    }

    /// Sets every variable to the value of the one of the same name in `other`.
    ///
    /// # Errors
    /// If the names or shapes of the two sets differ.
    pub fn copy_from(&self, other: &Params) -> Result<()> {
        let (own, theirs) = (self.names_and_vars(), other.names_and_vars());
        if own.len() != theirs.len()
            || own.iter().zip(&theirs).any(|(a, b)| a.0 != b.0 || a.1.dims() != b.1.dims())
        {
            candle_core::bail!("the two parameter sets differ: {} and {} variables", own.len(), theirs.len())
        }
        for ((_, to), (_, from)) in own.iter().zip(&theirs) {
            if !to.is_same(from) {
                assign(to, &from.as_tensor().detach().to_device(to.device())?.to_dtype(to.dtype())?)?;
            }
        }
        Ok(())
    }

    /// The variables whose names `keep` accepts, shared, not copied.
    pub fn subset(&self, keep: impl Fn(&str) -> bool) -> Params {
        let vars = self.names_and_vars().into_iter().filter(|(name, _)| keep(name)).collect();
        Params { seed: self.seed, vars: Arc::new(Mutex::new(vars)) }
    }

    /// The same names and values in variables of their own.
    ///
    /// # Errors
    /// If a copy fails.
    pub fn deep_clone(&self) -> Result<Params> {
        let mut vars = BTreeMap::new();
        for (name, var) in self.names_and_vars() {
            vars.insert(name, Var::from_tensor(&var.as_tensor().detach().copy()?)?);
        }
        Ok(Params { seed: self.seed, vars: Arc::new(Mutex::new(vars)) })
    }
}

trait SameVar {
    fn is_same(&self, other: &Var) -> bool;
}

impl SameVar for Var {
    fn is_same(&self, other: &Var) -> bool {
        self.as_tensor().id() == other.as_tensor().id()
    }
}

fn assign(var: &Var, value: &Tensor) -> Result<()> {
    var.set(&value.contiguous()?)
}

impl SimpleBackend for Params {
    fn get(&self, s: Shape, name: &str, h: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        if let Some(var) = Params::get(self, name) {
            if var.shape() != &s {
                return Err(Error::UnexpectedShape {
                    msg: format!("shape mismatch for {name}"),
                    expected: s,
                    got: var.shape().clone(),
                });
            }
            return var.as_tensor().to_device(dev)?.to_dtype(dtype);
        }
        let var = Var::from_tensor(&initial_value(self.seed, name, &s, h, dtype, dev)?)?;
        Ok(self.lock().entry(name.to_string()).or_insert(var).as_tensor().clone())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> Result<Tensor> {
        match Params::get(self, name) {
            Some(var) => var.as_tensor().to_device(dev)?.to_dtype(dtype),
            None => Err(Error::CannotFindTensor { path: name.to_string() }),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        Params::get(self, name).is_some()
    }
}

/// The first value of a variable: candle's initialisations with seeded noise.
fn initial_value(
    seed: u64,
    name: &str,
    shape: &Shape,
    init: Init,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let mut rng = Rng::from_key(name, seed);
    match init {
        Init::Const(value) => Tensor::full(value, shape.clone(), device)?.to_dtype(dtype),
        Init::Uniform { lo, up } => rng.uniform_tensor(lo, up, shape.clone(), dtype, device),
        Init::Randn { mean, stdev } => rng.normal_tensor(shape.clone(), dtype, device)?.affine(stdev, mean),
        Init::Kaiming { dist, fan, non_linearity } => {
            let std = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * std;
                    rng.uniform_tensor(-bound, bound, shape.clone(), dtype, device)
                }
                NormalOrUniform::Normal => rng.normal_tensor(shape.clone(), dtype, device)?.affine(std, 0.0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Device = Device::Cpu;

    fn two_layers(seed: u64, swap: bool) -> Params {
        let params = Params::new(seed);
        let vb = params.builder(DType::F32, &CPU);
        let mut names = ["a", "b"];
        if swap {
            names.reverse();
        }
        for name in names {
            vb.pp(name).get_with_hints((2, 3), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL).unwrap();
        }
        params
    }

    fn flat(params: &Params) -> Vec<f32> {
        params
            .names_and_vars()
            .iter()
            .flat_map(|(_, v)| v.as_tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect()
    }

    #[test]
    fn initial_values_do_not_depend_on_the_order_of_creation() {
        assert_eq!(flat(&two_layers(1, false)), flat(&two_layers(1, true)));
        assert_ne!(flat(&two_layers(1, false)), flat(&two_layers(2, false)));
    }

    #[test]
    fn a_checkpoint_round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.safetensors");
        let (a, b) = (two_layers(1, false), two_layers(2, false));
        a.save(&path, DType::F32).unwrap();
        b.load(&path).unwrap();
        assert_eq!(flat(&a), flat(&b));
        assert_eq!(a.len_params(), 12);
    }

    #[test]
    fn every_difference_is_listed_and_nothing_changes() {
        let params = two_layers(1, false);
        let before = flat(&params);
        let t = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
        let tensors = HashMap::from([("m.a.weight".to_string(), t((3, 2))), ("m.c".to_string(), t((1, 1)))]);
        let message = params.load_tensors(&tensors, "m.").unwrap_err().to_string();
        for part in
            ["`m.a.weight`: expected [2, 3], found [3, 2]", "`m.b.weight`: missing", "`m.c`: not used"]
        {
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(flat(&params), before);
    }

    #[test]
    fn a_deep_clone_is_apart_and_copy_from_brings_it_back() {
        let a = two_layers(1, false);
        let b = a.deep_clone().unwrap();
        let var = b.get("a.weight").unwrap();
        var.set(&var.zeros_like().unwrap()).unwrap();
        assert_ne!(flat(&a), flat(&b));
        b.copy_from(&a).unwrap();
        assert_eq!(flat(&a), flat(&b));
    }

    #[test]
    fn a_second_get_hands_out_the_same_variable_and_checks_its_shape() {
        let params = two_layers(1, false);
        let vb = params.builder(DType::F32, &CPU);
        let t = vb.get((2, 3), "a.weight").unwrap();
        assert_eq!(t.id(), params.get("a.weight").unwrap().as_tensor().id());
        assert!(vb.get((3, 3), "a.weight").is_err());
    }
}
