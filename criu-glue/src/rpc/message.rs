//! The messages, with the fields that are used and no others (criu's `images/rpc.proto`).
//!
//! Protobuf skips fields that a reader does not know, so answers of newer versions still decode.

/// `criu_req_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum RequestKind {
    Empty = 0,
    Dump = 1,
    Restore = 2,
    Notify = 6,
    FeatureCheck = 9,
    Version = 10,
}

/// `criu_network_lock_method`: SKIP.
pub(crate) const NETWORK_LOCK_SKIP: i32 = 3;
/// `criu_cg_mode`: IGNORE.
pub(crate) const CGROUPS_IGNORE: i32 = 0;

/// `criu_opts`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Options {
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    #[prost(bool, optional, tag = "4")]
    pub ext_unix_sk: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    #[prost(bool, optional, tag = "7")]
    pub shell_job: Option<bool>,
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    #[prost(string, optional, tag = "13")]
    pub root: Option<String>,
    #[prost(string, optional, tag = "14")]
    pub parent_img: Option<String>,
    #[prost(bool, optional, tag = "15")]
    pub track_mem: Option<bool>,
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    #[prost(message, repeated, tag = "27")]
    pub inherit_fd: Vec<InheritFd>,
    #[prost(int32, optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    #[prost(bool, optional, tag = "46")]
    pub tcp_skip_in_flight: Option<bool>,
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    #[prost(bool, optional, tag = "52")]
    pub tcp_close: Option<bool>,
    #[prost(int32, optional, tag = "64")]
    pub network_lock: Option<i32>,
}

/// `inherit_fd`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct InheritFd {
    #[prost(string, required, tag = "1")]
    pub key: String,
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
}

/// `criu_features`: asked for by setting a field, answered in the same field.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Features {
    #[prost(bool, optional, tag = "1")]
    pub mem_track: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    pub lazy_pages: Option<bool>,
}

/// `criu_req`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Request {
    #[prost(enumeration = "RequestKind", required, tag = "1")]
    pub kind: i32,
    #[prost(message, optional, tag = "2")]
    pub options: Option<Options>,
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    #[prost(message, optional, tag = "5")]
    pub features: Option<Features>,
}

impl Request {
    /// The answer to a notification.
    pub(crate) fn answer(success: bool) -> Self {
        Self { kind: RequestKind::Notify as i32, notify_success: Some(success), ..Self::default() }
    }
}

/// `criu_restore_resp`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Restored {
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

/// `criu_notify`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Notification {
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// `criu_version`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct VersionNumbers {
    #[prost(int32, required, tag = "1")]
    pub major: i32,
    #[prost(int32, required, tag = "2")]
    pub minor: i32,
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

/// `criu_resp`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Response {
    #[prost(enumeration = "RequestKind", required, tag = "1")]
    pub kind: i32,
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    #[prost(message, optional, tag = "4")]
    pub restore: Option<Restored>,
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notification>,
    #[prost(int32, optional, tag = "7")]
    pub errno: Option<i32>,
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    #[prost(string, optional, tag = "9")]
    pub message: Option<String>,
    #[prost(message, optional, tag = "10")]
    pub version: Option<VersionNumbers>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    /// The bytes that criu reads and writes: a change of a tag must not go unnoticed.
    #[test]
    fn golden() {
        let request = Request {
            kind: RequestKind::Dump as i32,
            options: Some(Options {
                images_dir_fd: 7,
                pid: Some(300),
                log_file: Some("l".into()),
                notify_scripts: Some(true),
                tcp_close: Some(true),
                network_lock: Some(NETWORK_LOCK_SKIP),
                ..Options::default()
            }),
            ..Request::default()
        };
        let expected = [
            0x08, 1, 0x12, 16, 0x08, 7, 0x10, 0xac, 0x02, 0x52, 1, b'l', 0x60, 1, 0xa0, 0x03, 1, 0x80, 0x04,
            3,
        ];
        assert_eq!(request.encode_to_vec()[..], expected[..]);
        assert_eq!(Request::answer(false).encode_to_vec(), [0x08, 6, 0x18, 0]);
        let response =
            [0x08, 6, 0x10, 1, 0x2a, 12, 0x0a, 8, b'p', b'r', b'e', b'-', b'd', b'u', b'm', b'p', 0x10, 5];
        let response = Response::decode(&response[..]).unwrap();
        assert!(response.success);
        let notification = response.notify.unwrap();
        assert_eq!((notification.script.as_deref(), notification.pid), (Some("pre-dump"), Some(5)));
    }
}
