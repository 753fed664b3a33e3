//! Backward pass with parameter gradients taken out of candle's sums.
//!
//! candle adds every gradient to a fresh tensor of zeros. For a weight that is two passes over memory more than the
//! gradient itself costs, on one thread. Inside [`backward`] the operations of this crate hand the gradients of
//! variables over directly; everything else goes the usual way, and `Tensor::backward` alone gives the same numbers.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};
use std::cell::RefCell;
use std::collections::HashMap;

thread_local! {
    /// Gradients of variables found by the running backward pass of this thread; `None` outside of one.
    static FOUND: RefCell<Option<HashMap<TensorId, Tensor>>> = const { RefCell::new(None) };
}

/// The gradients of `loss` with respect to all variables it depends on, as `loss.backward()`, only faster.
///
/// # Errors
/// If an operation on the way has no backward pass or fails.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    /// Leaves the thread as it was, also after an error or a panic.
    struct Reset(Option<HashMap<TensorId, Tensor>>);

    impl Drop for Reset {
        fn drop(&mut self) {
            let outer = self.0.take();
            FOUND.with(|found| *found.borrow_mut() = outer);
        }
    }

    let outer = FOUND.with(|found| found.borrow_mut().replace(HashMap::new()));
    let _reset = Reset(outer);
    let mut grads = loss.backward()?;
    let found = FOUND.with(|found| found.borrow_mut().take()).unwrap_or_default();
    for (id, grad) in found {
        let grad = match grads.get_id(id) {
            Some(other) => (other + grad)?,
            None => grad,
        };
        grads.insert_id(id, grad);
    }
    Ok(grads)
}

/// What an operation returns for its argument `param`: nothing if the gradient was handed over, else the gradient.
pub(crate) fn hand_over(param: &Tensor, grad: Tensor) -> Result<Option<Tensor>> {
    if !param.is_variable() {
        return Ok(Some(grad));
    }
    FOUND.with(|found| match found.borrow_mut().as_mut() {
        None => Ok(Some(grad)),
        Some(found) => {
            let sum = match found.remove(&param.id()) {
                Some(other) => (other + grad)?,
                None => grad,
            };
            found.insert(param.id(), sum);
            Ok(None)
        }
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    #[test]
    fn gradients_equal_those_of_candle() {
        let var = |n: usize, shape: &[usize]| {
            Var::from_tensor(&Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().reshape(shape).unwrap())
                .unwrap()
        };
        let (x, w, b) = (var(6, &[2, 3]), var(9, &[3, 3]), var(3, &[3]));
        // The weight is used twice by us and once by candle.
        let y = crate::linear(&x, &w, Some(&b)).unwrap();
        let y = crate::linear(&y, &w, None).unwrap();
        let loss = (y.sum_all().unwrap() + w.as_tensor().sqr().unwrap().sum_all().unwrap()).unwrap();
        let (got, want) = (super::backward(&loss).unwrap(), loss.backward().unwrap());
        for v in [&x, &w, &b] {
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(flat(got.get(v).unwrap()), flat(want.get(v).unwrap()));
        }
    }
}
