//! What the processes of one run exchange: [`Collective`], with the one-process version [`SingleProcess`].
//!
//! A run of one process and a run of many share all code above this trait. Transports (MPI, NCCL) implement it; this
//! crate does not know what is being reduced. Tensors stay on their device, host data travels as bytes.
//!
//! [`in_process`] joins threads of one process: the tests of everything that must not depend on the number of ranks
//! run with it, without MPI.

use std::sync::{Arc, Barrier, Mutex};

use candle_core::{Result, Tensor, bail};

/// Operations that every process of the run enters together, in the same order.
///
/// All results are the same on every rank, bit for bit: sums run in rank order.
pub trait Collective: Send + Sync {
    /// Number of this process, from 0.
    fn rank(&self) -> usize;

    /// Number of processes, at least 1.
    fn world_size(&self) -> usize;

    /// Everybody's tensor, in rank order. Shapes may differ between ranks; the dtype may not.
    ///
    /// # Errors
    /// If the transport fails.
    fn all_gather(&self, x: &Tensor) -> Result<Vec<Tensor>>;

    /// Everybody's bytes, in rank order; lengths may differ.
    ///
    /// # Errors
    /// If the transport fails.
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Mean over the ranks, element by element, in the dtype of `x`.
    ///
    /// # Shapes
    /// The same on every rank; returns that shape.
    ///
    /// # Errors
    /// If the shapes differ between ranks or the transport fails.
    fn all_reduce_mean(&self, x: &Tensor) -> Result<Tensor>;

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// If the transport fails.
    fn barrier(&self) -> Result<()>;

    /// Whether this process is the one that writes logs and checkpoints.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }
}

/// The collective of a run of one process: everything is the identity.
#[derive(Debug, Clone, Copy, Default)]
pub struct SingleProcess;

impl Collective for SingleProcess {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_gather(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![x.clone()])
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }

    fn all_reduce_mean(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

/// One rank of a group of threads ([`in_process`]).
pub struct InProcess {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    barrier: Barrier,
    tensors: Mutex<Vec<Option<Tensor>>>,
    bytes: Mutex<Vec<Vec<u8>>>,
}

/// `world_size` ranks that meet inside this process; give one to each of as many threads.
///
/// A rank that stops early leaves the others waiting, as it would between processes.
pub fn in_process(world_size: usize) -> Vec<InProcess> {
    let shared = Arc::new(Shared {
        barrier: Barrier::new(world_size),
        tensors: Mutex::new(vec![None; world_size]),
        bytes: Mutex::new(vec![Vec::new(); world_size]),
    });
    (0..world_size).map(|rank| InProcess { rank, shared: Arc::clone(&shared) }).collect()
}

impl InProcess {
    /// Puts a value into this rank's slot, waits for all, copies all slots, waits for all to have copied.
    fn exchange<T: Clone>(&self, slots: &Mutex<Vec<T>>, value: T) -> Vec<T> {
        let lock = || slots.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        lock()[self.rank] = value;
        self.shared.barrier.wait();
        let all = lock().clone();
        self.shared.barrier.wait();
        all
    }
}

impl Collective for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        lock_len(&self.shared.bytes)
    }

    fn all_gather(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        Ok(self.exchange(&self.shared.tensors, Some(x.clone())).into_iter().flatten().collect())
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(self.exchange(&self.shared.bytes, bytes.to_vec()))
    }

    fn all_reduce_mean(&self, x: &Tensor) -> Result<Tensor> {
        let all = self.all_gather(x)?;
        let mut sum: Option<Tensor> = None;
        for (rank, part) in all.iter().enumerate() {
            if part.dims() != x.dims() {
                bail!(
                    "all_reduce_mean: rank {rank} has shape {:?}, rank {} {:?}",
                    part.dims(),
                    self.rank,
                    x.dims()
                );
            }
            sum = Some(match sum {
                None => part.clone(),
                Some(sum) => (sum + part)?,
            });
        }
        match sum {
            Some(sum) => sum / all.len() as f64,
            None => bail!("all_reduce_mean: the group has no ranks"),
        }
    }

    fn barrier(&self) -> Result<()> {
        self.shared.barrier.wait();
        Ok(())
    }
}

fn lock_len<T>(slots: &Mutex<Vec<T>>) -> usize {
    slots.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn one_process_is_the_identity() -> Result<()> {
        let x = Tensor::new(&[1f64, 2.0], &Device::Cpu)?;
        let one = SingleProcess;
        assert_eq!((one.rank(), one.world_size(), one.is_first()), (0, 1, true));
        assert_eq!(one.all_reduce_mean(&x)?.to_vec1::<f64>()?, [1.0, 2.0]);
        assert_eq!(one.all_gather(&x)?.len(), 1);
        assert_eq!(one.all_gather_bytes(b"ab")?, [b"ab".to_vec()]);
        one.barrier()
    }

    #[test]
    fn threads_gather_in_rank_order_and_agree_on_the_mean() {
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = in_process(3)
                .into_iter()
                .map(|group| {
                    scope.spawn(move || -> Result<_> {
                        let x = Tensor::new(&[group.rank() as f64, 1.0], &Device::Cpu)?;
                        let mut means = Vec::new();
                        for _ in 0..20 {
                            means = group.all_reduce_mean(&x)?.to_vec1::<f64>()?;
                        }
                        group.barrier()?;
                        Ok((means, group.all_gather_bytes(&vec![7; group.rank()])?, group.world_size()))
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap().unwrap()).collect()
        });
        for (means, bytes, world) in results {
            assert_eq!(means, [1.0, 1.0]);
            assert_eq!(bytes, [vec![], vec![7], vec![7, 7]]);
            assert_eq!(world, 3);
        }
    }

    #[test]
    fn shapes_that_differ_are_named() {
        let errors: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = in_process(2)
                .into_iter()
                .map(|group| {
                    scope.spawn(move || {
                        let x = Tensor::zeros(1 + group.rank(), candle_core::DType::F32, &Device::Cpu)?;
                        group.all_reduce_mean(&x)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap().unwrap_err().to_string()).collect()
        });
        assert!(errors[0].contains("rank 1 has shape [2]"), "{}", errors[0]);
    }
}
