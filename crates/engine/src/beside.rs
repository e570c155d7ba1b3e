//! Where the running kernel keeps what travels beside a frame of a veth, for the program (`towpath_tables::mark`).

use btf_rs::{Btf, Struct, Type};
use std::path::Path;
use std::sync::OnceLock;
use towpath_tables::mark::{Function, Number};

/// Types of the kernel itself and, where it is a module, of the veth driver
const KERNEL: &str = "/sys/kernel/btf/vmlinux";
const VETH: &str = "/sys/kernel/btf/veth";

/// What stands in the program's code for each mark.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Places {
    functions: [u32; Function::ALL.len()],
    numbers: [u32; Number::ALL.len()],
}

impl Places {
    /// BTF identifier of a function
    pub(crate) fn function(&self, function: Function) -> u32 {
        self.functions[function as usize]
    }

    pub(crate) fn number(&self, number: Number) -> u32 {
        self.numbers[number as usize]
    }

    /// Those of the running kernel, or why it does not tell. A driver that is a module may be loaded later: then it
    /// is worth asking again.
    pub(crate) fn find() -> Result<Self, String> {
        static FOUND: OnceLock<Places> = OnceLock::new();
        match FOUND.get() {
            Some(places) => Ok(*places),
            None => read().map(|places| *FOUND.get_or_init(|| places)),
        }
    }
}

fn read() -> Result<Places, String> {
    let failed = |path: &str, e: &dyn std::fmt::Display| format!("{path}: {e}");
    // At once: btf_rs asks for its place in a file at each type, and there are a hundred thousand.
    let bytes = |path: &str| std::fs::read(path).map_err(|e| failed(path, &e));
    let (kernel, too_old) = (bytes(KERNEL)?, || "Linux before 6.2 has no functions for it".to_string());
    if !Function::ALL.iter().all(|function| tells_of(&kernel, function.name())) {
        return Err(too_old());
    }
    let kernel = Btf::from_bytes(&kernel).map_err(|e| failed(KERNEL, &e))?;
    let types = Types(&kernel);
    let functions = Function::ALL.map(|function| types.function(function.name()));
    let [Some(cast_to_kern_ctx), Some(rdonly_cast)] = functions else { return Err(too_old()) };
    let veth = match Path::new(VETH).exists() {
        true => &Btf::from_split_bytes(&bytes(VETH)?, &kernel).map_err(|e| failed(VETH, &e))?,
        false => &kernel,
    };
    let (_, xdp_buff) = types.structure("xdp_buff")?;
    let size = xdp_buff.size() as u32;
    let (_, of_veth) = Types(veth)
        .structure("veth_xdp_buff")
        .map_err(|e| format!("{e} (the driver is not loaded, or that of Linux before 6.3)"))?;
    let (list, of_list) = types.structure("sk_buff_list")?;
    let (_, skb) = types.structure("sk_buff")?;
    let summed = types.field(&skb, "ip_summed")?;
    let vlan = types.field(&skb, "vlan_all")?;
    let as_known = Types(veth).field(&of_veth, "skb")?.at == size * 8
        && Types(veth).field(&of_veth, "xdp")?.at == 0
        && types.field(&of_list, "next")?.at == 0
        && summed.bits == Some(2)
        && types.field(&skb, "vlan_proto")?.at == vlan.at
        && types.field(&skb, "vlan_tci")?.at == vlan.at + 16;
    if !as_known {
        return Err("the kernel's structures are not those that are known".into());
    }
    let numbers = [size, list, summed.at / 8, 3 << (summed.at % 8), vlan.at / 8];
    Ok(Places { functions: [cast_to_kern_ctx, rdonly_cast], numbers })
}

/// Whether the name is among the strings, each of which a zero ends: soon seen, while taking all types apart is not.
fn tells_of(btf: &[u8], name: &str) -> bool {
    btf.split(|byte| *byte == 0).any(|string| string == name.as_bytes())
}

/// A field of a structure.
struct Field {
    /// Where it begins, in bits
    at: u32,
    /// How many it has, if it is a bit field
    bits: Option<u32>,
}

struct Types<'a>(&'a Btf);

impl Types<'_> {
    fn function(&self, name: &str) -> Option<u32> {
        let ids = self.0.resolve_ids_by_name(name).ok()?;
        ids.into_iter().find(|id| matches!(self.0.resolve_type_by_id(*id), Ok(Type::Func(_))))
    }

    fn structure(&self, name: &str) -> Result<(u32, Struct), String> {
        let ids = self.0.resolve_ids_by_name(name).unwrap_or_default();
        let mut found = ids.into_iter().filter_map(|id| match self.0.resolve_type_by_id(id) {
            Ok(Type::Struct(structure)) => Some((id, structure)),
            _ => None,
        });
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            _ => Err(format!("the kernel does not tell of one struct {name}")),
        }
    }

    fn field(&self, structure: &Struct, name: &str) -> Result<Field, String> {
        self.find(structure, name).ok_or_else(|| format!("the kernel tells of no field {name}"))
    }

    /// The field, wherever it is in the structure and in those without a name within.
    fn find(&self, structure: &Struct, name: &str) -> Option<Field> {
        structure.members.iter().find_map(|member| {
            let at = member.bit_offset();
            match self.0.resolve_name(member).unwrap_or_default().as_str() {
                "" => match self.0.resolve_chained_type(member).ok()? {
                    Type::Struct(inner) | Type::Union(inner) => {
                        self.find(&inner, name).map(|field| Field { at: at + field.at, ..field })
                    }
                    _ => None,
                },
                found => (found == name).then(|| Field { at, bits: member.bitfield_size() }),
            }
        })
    }
}
