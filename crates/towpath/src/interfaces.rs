//! Interfaces of this namespace by name, straight from the kernel (sysfs may show another namespace's).

use crate::text::suggestion;
use anyhow::{Context, Result};
use std::ffi::CStr;

/// Name and index of every interface of the calling thread's namespace.
pub fn all() -> Result<Vec<(String, u32)>> {
    // SAFETY: the array that if_nameindex returns ends with an entry of index 0 and is freed once, after the last use.
    unsafe {
        let array = libc::if_nameindex();
        if array.is_null() {
            return Err(std::io::Error::last_os_error()).context("cannot list interfaces");
        }
        let mut interfaces = Vec::new();
        let mut entry = array;
        while (*entry).if_index != 0 {
            let name = CStr::from_ptr((*entry).if_name).to_string_lossy().into_owned();
            interfaces.push((name, (*entry).if_index));
            entry = entry.add(1);
        }
        libc::if_freenameindex(array);
        Ok(interfaces)
    }
}

/// Index of the named interface, or a message that offers the nearest names.
pub fn index(interfaces: &[(String, u32)], wanted: &str) -> Result<u32> {
    if let Some((_, index)) = interfaces.iter().find(|(name, _)| name == wanted) {
        return Ok(*index);
    }
    let names: Vec<&str> = interfaces.iter().map(|(name, _)| name.as_str()).collect();
    anyhow::bail!("no interface {wanted:?} in this network namespace{}", suggestion(&names, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_offered() {
        let interfaces = vec![("eth0".to_string(), 2), ("eth1".to_string(), 3), ("uplink".to_string(), 4)];
        let message = |wanted| index(&interfaces, wanted).unwrap_err().to_string();
        assert_eq!(index(&interfaces, "eth1").unwrap(), 3);
        assert!(message("uplnk").ends_with("did you mean uplink?"), "{}", message("uplnk"));
        assert!(message("eth9").ends_with("did you mean eth0 or eth1?"), "{}", message("eth9"));
        assert!(message("wireless").ends_with("there are eth0, eth1, uplink"), "{}", message("wireless"));
    }

    #[test]
    fn the_kernel_lists_loopback() {
        assert!(all().unwrap().iter().any(|(name, _)| name == "lo"));
    }
}
