//! Python's pickle format as far as PyTorch's checkpoints use it: read as data, never run.
//!
//! A pickle is a program for a small stack machine, and one of its instructions calls any Python function by name.
//! Here a name outside [`meaning`] is an error that says the name, and those in it make tensors, dictionaries or
//! nothing at all. Reference for the instructions: Python's `pickletools`; for the tensors: PyTorch's
//! `torch/_utils.py` and `torch/serialization.py`. Written from their formats, no code taken.

use std::collections::HashMap;
use std::rc::Rc;

/// A tensor as a checkpoint describes it: a view of a storage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorView {
    /// Kind of the storage, such as `FloatStorage`.
    pub(super) kind: String,
    /// Name of the storage in the archive.
    pub(super) storage: String,
    /// Elements before the first.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Elements between neighbours, per axis.
    pub(super) stride: Vec<usize>,
}

/// What a pickle describes, as far as it matters here. Containers are places in [`Machine::nodes`], so that cycles
/// and great depth do no harm.
#[derive(Debug, Clone)]
enum Value {
    /// Something that is of no use here: None, a number with a fraction, bytes, an array of numpy.
    Other,
    Int(i64),
    Text(Rc<str>),
    Node(usize),
}

#[derive(Debug)]
enum Node {
    Sequence(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Global(Meaning, Rc<str>),
    /// Kind and name.
    Storage(String, String),
    Tensor(TensorView),
    /// An object whose state is of no use here.
    Object,
}

/// What a call of a name gives.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Meaning {
    Dict,
    Tensor,
    /// The first argument.
    First,
    /// The first argument called with the third.
    Typed,
    Storage,
    Object,
}

/// The names that a checkpoint may use; all others are refused.
fn meaning(module: &str, name: &str) -> Option<Meaning> {
    Some(match (module, name) {
        ("collections", "OrderedDict" | "defaultdict" | "Counter") => Meaning::Dict,
        ("__builtin__" | "builtins", "dict") => Meaning::Dict,
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Meaning::Tensor,
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Meaning::First,
        ("torch._tensor", "_rebuild_from_type_v2") => Meaning::Typed,
        ("torch" | "torch.storage" | "torch.cuda", name) if name.ends_with("Storage") => Meaning::Storage,
        ("torch", "Tensor" | "Size" | "device" | "dtype" | "Generator") => Meaning::Object,
        ("torch.nn.parameter", "Parameter") => Meaning::Object,
        // `torch.float32` and its kind
        ("torch", name) if is_dtype(name) => Meaning::Object,
        ("argparse", "Namespace") | ("_codecs", "encode") => Meaning::Object,
        // numbers of numpy, which training scripts leave beside the weights
        ("numpy", "dtype" | "ndarray") => Meaning::Object,
        ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar" | "_reconstruct") => Meaning::Object,
        (
            "__builtin__" | "builtins",
            "int" | "float" | "bool" | "complex" | "str" | "bytes" | "bytearray" | "list" | "tuple" | "set"
            | "frozenset" | "slice",
        ) => Meaning::Object,
        _ => return None,
    })
}

fn is_dtype(name: &str) -> bool {
    let kinds = ["float", "bfloat", "int", "uint", "complex", "qint", "quint"];
    let letters = name.trim_end_matches(|c: char| c.is_ascii_digit());
    kinds.contains(&letters) || matches!(name, "bool" | "half" | "double" | "long" | "short")
}

/// Names under which training scripts keep the weights beside other things.
const STATE_KEYS: [&str; 3] = ["state_dict", "model_state_dict", "model"];

/// The named tensors of a checkpoint's pickle. Where a dictionary holds the weights beside other things (`state_dict`,
/// `model_state_dict`, `model`), only those are listed. Names of nested dictionaries are joined with dots; a `module.`
/// that every name begins with (from `DataParallel`) is left out.
///
/// # Errors
/// A sentence: if the pickle is damaged, names a function that no checkpoint needs, or holds no tensor.
pub(super) fn named_tensors(bytes: &[u8]) -> Result<Vec<(String, TensorView)>, String> {
    let mut machine =
        Machine { bytes, at: 0, stack: vec![], marks: vec![], memo: HashMap::new(), nodes: vec![] };
    let top = machine.run()?;
    let mut found = vec![];
    let state = STATE_KEYS.iter().find_map(|key| {
        let value = machine.entry(&top, key)?;
        machine.collect(&value, "", 0, &mut found);
        (!found.is_empty()).then_some(())
    });
    if state.is_none() {
        machine.collect(&top, "", 0, &mut found);
    }
    if found.is_empty() {
        return Err("it holds no tensors by name; expected the `state_dict` of a model".into());
    }
    if found.iter().all(|(name, _)| name.starts_with("module.")) {
        for (name, _) in &mut found {
            name.drain(.."module.".len());
        }
    }
    Ok(found)
}

/// Dictionaries deeper than this hold no weights.
const MAX_DEPTH: usize = 8;

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    nodes: Vec<Node>,
}

impl Machine<'_> {
    /// Runs to the end; gives what is left on the stack.
    fn run(&mut self) -> Result<Value, String> {
        loop {
            let code = self.take(1)?[0];
            match code {
                b'.' => return self.pop(),   // STOP
                0x80 => drop(self.take(1)?), // PROTO
                0x95 => drop(self.take(8)?), // FRAME
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),        // POP
                b'1' => drop(self.since_mark()?), // POP_MARK
                b'2' => {
                    let top = self.top()?.clone(); // DUP
                    self.stack.push(top);
                }
                b'N' | 0x88 | 0x89 => self.stack.push(Value::Other), // NONE, NEWTRUE, NEWFALSE
                b'K' => self.int(1)?,                                // BININT1
                b'M' => self.int(2)?,                                // BININT2
                b'J' => {
                    let bytes = self.take(4)?; // BININT, signed
                    let value = i32::from_le_bytes(bytes.try_into().expect("four bytes were taken"));
                    self.stack.push(Value::Int(value.into()));
                }
                0x8a => {
                    let len = self.take(1)?[0] as usize; // LONG1
                    self.long(len)?;
                }
                0x8b => {
                    let len = self.length(4)?; // LONG4
                    self.long(len)?;
                }
                b'I' | b'L' | b'F' => {
                    let line = self.line()?; // INT, LONG, FLOAT as text
                    let number = line.trim_end_matches('L').parse();
                    self.stack.push(number.map_or(Value::Other, Value::Int));
                }
                b'G' => {
                    self.take(8)?; // BINFLOAT
                    self.stack.push(Value::Other);
                }
                b'X' => self.text(4)?,              // BINUNICODE
                0x8c => self.text(1)?,              // SHORT_BINUNICODE
                0x8d => self.text(8)?,              // BINUNICODE8
                b'U' => self.text(1)?,              // SHORT_BINSTRING, of Python 2
                b'T' => self.text(4)?,              // BINSTRING, of Python 2
                b'C' => self.skip_bytes(1)?,        // SHORT_BINBYTES
                b'B' => self.skip_bytes(4)?,        // BINBYTES
                0x8e | 0x96 => self.skip_bytes(8)?, // BINBYTES8, BYTEARRAY8
                b')' => self.sequence(vec![]),
                b']' | 0x8f => self.sequence(vec![]), // EMPTY_LIST, EMPTY_SET
                b't' | b'l' | 0x91 => {
                    let items = self.since_mark()?; // TUPLE, LIST, FROZENSET
                    self.sequence(items);
                }
                0x85..=0x87 => {
                    let n = code as usize - 0x84; // TUPLE1 to TUPLE3
                    let start = self.stack.len().checked_sub(n).filter(|s| *s >= self.floor());
                    let items = self.stack.split_off(start.ok_or_else(|| self.damaged("too few values"))?);
                    self.sequence(items);
                }
                b'a' => {
                    let item = self.pop()?; // APPEND
                    self.extend(vec![item])?;
                }
                b'e' | 0x90 => {
                    let items = self.since_mark()?; // APPENDS, ADDITEMS
                    self.extend(items)?;
                }
                b'}' => self.node(Node::Dict(vec![])),
                b'd' => {
                    let items = self.since_mark()?; // DICT
                    self.node(Node::Dict(vec![]));
                    self.set_items(items)?;
                }
                b's' => {
                    let value = self.pop()?; // SETITEM
                    let key = self.pop()?;
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?; // SETITEMS
                    self.set_items(items)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?); // GLOBAL
                    self.global(&module, &name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?); // STACK_GLOBAL
                    match (module, name) {
                        (Value::Text(module), Value::Text(name)) => self.global(&module, &name)?,
                        _ => return Err(self.damaged("a name that is no text")),
                    }
                }
                b'R' | 0x81 => {
                    let arguments = self.pop()?; // REDUCE, NEWOBJ
                    let callable = self.pop()?;
                    self.call(&callable, &arguments)?;
                }
                0x92 => {
                    let (_, arguments, class) = (self.pop()?, self.pop()?, self.pop()?); // NEWOBJ_EX
                    self.call(&class, &arguments)?;
                }
                b'b' => drop(self.pop()?), // BUILD: attributes of an object, no weights
                b'Q' => {
                    let id = self.pop()?; // BINPERSID
                    self.storage(&id)?;
                }
                b'q' => {
                    let place = self.take(1)?[0].into(); // BINPUT
                    self.memoize(place)?;
                }
                b'r' => {
                    let place = self.length(4)? as u64; // LONG_BINPUT
                    self.memoize(place)?;
                }
                0x94 => self.memoize(self.memo.len() as u64)?, // MEMOIZE
                b'h' => {
                    let place = self.take(1)?[0].into(); // BINGET
                    self.recall(place)?;
                }
                b'j' => {
                    let place = self.length(4)? as u64; // LONG_BINGET
                    self.recall(place)?;
                }
                other => return Err(self.damaged(&format!("unknown instruction {other:#04x}"))),
            }
        }
    }

    fn damaged(&self, what: &str) -> String {
        format!("its pickle is damaged at byte {}: {what}", self.at)
    }

    fn take(&mut self, n: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| self.damaged("it ends too early"))?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn length(&mut self, n: usize) -> Result<usize, String> {
        let value = self.take(n)?.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        usize::try_from(value).map_err(|_| self.damaged("a length beyond this machine"))
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at..];
        let n = rest.iter().position(|b| *b == b'\n').ok_or_else(|| self.damaged("it ends too early"))?;
        self.at += n + 1;
        Ok(String::from_utf8_lossy(&rest[..n]).trim_end_matches('\r').to_string())
    }

    fn int(&mut self, n: usize) -> Result<(), String> {
        let value = self.length(n)? as i64;
        self.stack.push(Value::Int(value));
        Ok(())
    }

    /// A signed number in `len` bytes; one beyond 64 bits is of no use here.
    fn long(&mut self, len: usize) -> Result<(), String> {
        let bytes = self.take(len)?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        let value = match len {
            0..=8 => {
                wide[..len].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(wide))
            }
            _ => Value::Other,
        };
        self.stack.push(value);
        Ok(())
    }

    fn text(&mut self, n: usize) -> Result<(), String> {
        let len = self.length(n)?;
        let text = String::from_utf8_lossy(self.take(len)?).into();
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn skip_bytes(&mut self, n: usize) -> Result<(), String> {
        let len = self.length(n)?;
        self.take(len)?;
        self.stack.push(Value::Other);
        Ok(())
    }

    /// Height of the stack below which an instruction must not reach.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Value, String> {
        if self.stack.len() <= self.floor() {
            return Err(self.damaged("too few values"));
        }
        Ok(self.stack.pop().expect("the stack is higher than its floor"))
    }

    fn top(&self) -> Result<&Value, String> {
        self.stack.last().ok_or_else(|| self.damaged("too few values"))
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().ok_or_else(|| self.damaged("a mark is missing"))?;
        Ok(self.stack.split_off(mark))
    }

    fn node(&mut self, node: Node) {
        self.stack.push(Value::Node(self.nodes.len()));
        self.nodes.push(node);
    }

    fn sequence(&mut self, items: Vec<Value>) {
        self.node(Node::Sequence(items));
    }

    /// Adds to the list on the stack.
    fn extend(&mut self, items: Vec<Value>) -> Result<(), String> {
        match *self.top()? {
            Value::Node(at) => match &mut self.nodes[at] {
                Node::Sequence(list) => list.extend(items),
                Node::Object => {} // a set
                _ => return Err(self.damaged("an item for something that is no list")),
            },
            _ => return Err(self.damaged("an item for something that is no list")),
        }
        Ok(())
    }

    /// Adds keys and values, in turn, to the dictionary on the stack.
    fn set_items(&mut self, items: Vec<Value>) -> Result<(), String> {
        match *self.top()? {
            Value::Node(at) => match &mut self.nodes[at] {
                Node::Dict(dict) => {
                    dict.extend(items.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())));
                }
                Node::Object => {}
                _ => return Err(self.damaged("an entry for something that is no dictionary")),
            },
            _ => return Err(self.damaged("an entry for something that is no dictionary")),
        }
        Ok(())
    }

    fn memoize(&mut self, place: u64) -> Result<(), String> {
        let value = self.top()?.clone();
        self.memo.insert(place, value);
        Ok(())
    }

    fn recall(&mut self, place: u64) -> Result<(), String> {
        let value = self.memo.get(&place).cloned().ok_or_else(|| self.damaged("an unknown reference"))?;
        self.stack.push(value);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        let Some(meaning) = meaning(module, name) else {
            return Err(format!(
                "its pickle calls `{module}.{name}`, which no weights need and which is not run\nhint: if you trust \
                 the file, load it in Python and save the `state_dict` alone, best as safetensors"
            ));
        };
        self.node(Node::Global(meaning, name.into()));
        Ok(())
    }

    fn items(&self, value: &Value) -> Option<&[Value]> {
        match value {
            Value::Node(at) => match &self.nodes[*at] {
                Node::Sequence(items) => Some(items),
                _ => None,
            },
            _ => None,
        }
    }

    /// The result of a call, onto the stack.
    fn call(&mut self, callable: &Value, arguments: &Value) -> Result<(), String> {
        let meaning = match callable {
            Value::Node(at) => match &self.nodes[*at] {
                Node::Global(meaning, _) => Some(*meaning),
                _ => None,
            },
            _ => None,
        };
        let arguments = self.items(arguments).map(<[Value]>::to_vec);
        let (Some(meaning), Some(arguments)) = (meaning, arguments) else {
            return Err(self.damaged("a call of something that is no function"));
        };
        match meaning {
            Meaning::Dict => self.node(Node::Dict(vec![])),
            Meaning::Object | Meaning::Storage => self.node(Node::Object),
            Meaning::First => self.stack.push(arguments.first().cloned().unwrap_or(Value::Other)),
            Meaning::Typed => match arguments.as_slice() {
                [inner, _, arguments, ..] if !self.is_typed(inner) => return self.call(inner, arguments),
                _ => return Err(self.damaged("a tensor of an unknown type")),
            },
            Meaning::Tensor => {
                let view = self.view(&arguments);
                let view = view.ok_or_else(|| self.damaged("a tensor without storage or shape"))?;
                self.node(Node::Tensor(view));
            }
        }
        Ok(())
    }

    /// Whether a value is the function of [`Meaning::Typed`]: one inside another would never end.
    fn is_typed(&self, value: &Value) -> bool {
        matches!(value, Value::Node(at) if matches!(self.nodes[*at], Node::Global(Meaning::Typed, _)))
    }

    /// `(storage, offset, shape, stride, …)`.
    fn view(&self, arguments: &[Value]) -> Option<TensorView> {
        let [Value::Node(storage), Value::Int(offset), shape, stride, ..] = arguments else { return None };
        let Node::Storage(kind, name) = &self.nodes[*storage] else { return None };
        let sizes = |value: &Value| -> Option<Vec<usize>> {
            let size = |v: &Value| match v {
                Value::Int(n) => usize::try_from(*n).ok(),
                _ => None,
            };
            self.items(value)?.iter().map(size).collect()
        };
        let (shape, stride) = (sizes(shape)?, sizes(stride)?);
        let offset = usize::try_from(*offset).ok()?;
        (shape.len() == stride.len()).then(|| TensorView {
            kind: kind.clone(),
            storage: name.clone(),
            offset,
            shape,
            stride,
        })
    }

    /// `("storage", kind, name, device, length)`.
    fn storage(&mut self, id: &Value) -> Result<(), String> {
        let named = match self.items(id) {
            Some([Value::Text(what), Value::Node(kind), Value::Text(name), ..]) if &**what == "storage" => {
                match &self.nodes[*kind] {
                    Node::Global(Meaning::Storage, kind) => Some((kind.to_string(), name.to_string())),
                    _ => None,
                }
            }
            _ => None,
        };
        let (kind, name) = named.ok_or_else(|| self.damaged("a storage of an unknown kind"))?;
        self.node(Node::Storage(kind, name));
        Ok(())
    }

    /// The value of a key in a dictionary.
    fn entry(&self, dict: &Value, key: &str) -> Option<Value> {
        let Value::Node(at) = dict else { return None };
        let Node::Dict(pairs) = &self.nodes[*at] else { return None };
        pairs.iter().find_map(|(k, v)| matches!(k, Value::Text(k) if &**k == key).then(|| v.clone()))
    }

    /// Tensors in a dictionary and those in it.
    fn collect(&self, value: &Value, prefix: &str, depth: usize, found: &mut Vec<(String, TensorView)>) {
        let Value::Node(at) = value else { return };
        match &self.nodes[*at] {
            Node::Tensor(view) if !prefix.is_empty() => found.push((prefix.to_string(), view.clone())),
            Node::Dict(pairs) if depth < MAX_DEPTH => {
                for (key, value) in pairs {
                    let Value::Text(key) = key else { continue };
                    let name = if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
                    self.collect(value, &name, depth + 1, found);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `OrderedDict` with the entry `name`: a tensor of shape `[2, 3]`, as protocol 2 writes it.
    fn tensor(name: &str) -> Vec<u8> {
        let mut out = text(name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        out.extend(text("storage"));
        out.extend(b"ctorch\nFloatStorage\n");
        out.extend(text("7"));
        out.extend(text("cpu"));
        out.extend(b"K\x06tQK\x01K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR");
        out
    }

    fn text(text: &str) -> Vec<u8> {
        let mut out = vec![b'X'];
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
        out
    }

    fn view() -> TensorView {
        TensorView {
            kind: "FloatStorage".into(),
            storage: "7".into(),
            offset: 1,
            shape: vec![2, 3],
            stride: vec![3, 1],
        }
    }

    fn dict(entries: &[Vec<u8>]) -> Vec<u8> {
        [&b"}("[..], &entries.concat(), b"u"].concat()
    }

    fn pickle(value: &[u8]) -> Vec<u8> {
        [b"\x80\x02", value, b"."].concat()
    }

    #[test]
    fn a_state_dict_is_found_beside_other_things_and_loses_module() {
        let state = dict(&[tensor("module.a"), tensor("module.b.c")]);
        let whole = dict(&[
            [text("epoch"), b"K\x0f".to_vec()].concat(),
            [text("state_dict"), state].concat(),
            [text("optimizer"), dict(&[tensor("exp_avg")])].concat(),
        ]);
        let want = [("a".to_string(), view()), ("b.c".to_string(), view())];
        assert_eq!(named_tensors(&pickle(&whole)).unwrap(), want);
        // without such a key all dictionaries count
        let nested = dict(&[[text("gen"), dict(&[tensor("w")])].concat(), tensor("v")]);
        let names: Vec<String> = named_tensors(&pickle(&nested)).unwrap().into_iter().map(|t| t.0).collect();
        assert_eq!(names, ["gen.w", "v"]);
    }

    #[test]
    fn numbers_of_numpy_do_no_harm() {
        let scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nX\x02\x00\x00\x00f8K\x00K\x01\x87R(K\x03NtbX\x01\x00\x00\x00atR";
        let whole = dict(&[[text("best"), scalar.to_vec()].concat(), tensor("w")]);
        assert_eq!(named_tensors(&pickle(&whole)).unwrap()[0].0, "w");
    }

    #[test]
    fn a_pickle_that_wants_to_run_code_is_refused_by_name() {
        for call in [&b"cos\nsystem\n"[..], b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93"] {
            let bytes = pickle(&[call, b"X\x02\x00\x00\x00ls\x85R"].concat());
            let message = named_tensors(&bytes).unwrap_err();
            assert!(message.contains("calls `os.system`") && message.contains("hint"), "{message}");
        }
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let whole = pickle(&dict(&[tensor("a"), tensor("b")]));
        for end in 0..whole.len() - 1 {
            assert!(named_tensors(&whole[..end]).is_err());
        }
        // every byte changed to a few others: any answer, but an answer
        for at in 0..whole.len() {
            for byte in [0, b'(', b't', b'R', b'u', b'a', 0x85, 0x93, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = byte;
                let _ = named_tensors(&bytes);
            }
        }
        // a list in itself, and a hundred thousand tuples deep
        let cyclic = pickle(b"}q\x00X\x01\x00\x00\x00ah\x00s");
        assert!(named_tensors(&cyclic).unwrap_err().contains("no tensors"));
        let deep = pickle(&[b")".to_vec(), vec![0x85; 100_000]].concat());
        assert!(named_tensors(&deep).unwrap_err().contains("no tensors"));
    }
}
