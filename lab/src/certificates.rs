//! Certificates for TLS in tests, made anew each time.

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// An authority that signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// Where the files of one end lie.
#[derive(Clone, Debug)]
pub struct Files {
    /// Its certificate
    pub certificate: PathBuf,
    /// Its private key
    pub key: PathBuf,
    /// The authority's certificate
    pub authority: PathBuf,
}

/// When a certificate is good.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// Now, and for a long time
    Now,
    /// Until many years ago
    Past,
}

impl Authority {
    /// A new one of this name.
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    /// Makes a certificate for a name, and leaves what its owner needs in this folder, which may have several.
    pub fn certify(&self, folder: &Path, name: &str, validity: Validity) -> Result<Files> {
        let mut params = CertificateParams::new([name.to_owned()])?;
        if validity == Validity::Past {
            (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        let path = |ending: &str| folder.join(format!("{name}.{ending}"));
        let files = Files { certificate: path("pem"), key: path("key"), authority: path("authority.pem") };
        fs::create_dir_all(folder)?;
        fs::write(&files.certificate, certificate.pem())?;
        fs::write(&files.authority, self.0.pem())?;
        fs::write(&files.key, key.serialize_pem())?;
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600))?;
        Ok(files)
    }
}
