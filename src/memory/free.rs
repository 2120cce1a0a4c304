//! How much memory this process may still take: the least of what the machine has, its control groups allow, and its own limits leave.

use std::path::{Component, Path, PathBuf};

use super::gigabytes;

/// Memory that can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Free {
    /// Bytes that this process may take beside what it has.
    pub bytes: u64,
    /// What they are limited by.
    limit: String,
}

impl std::fmt::Display for Free {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} can be had ({})", gigabytes(self.bytes), self.limit)
    }
}

impl Free {
    /// So many bytes, whatever the limit.
    #[cfg(test)]
    pub(super) fn of(bytes: u64) -> Free {
        Free { bytes, limit: "a test".to_owned() }
    }

    /// What there is now; `None` where the system does not tell.
    pub fn now() -> Option<Free> {
        #[cfg(target_os = "linux")]
        {
            use rustix::process::{Resource, getrlimit};
            let limits = [Resource::As, Resource::Data].map(|resource| getrlimit(resource).current);
            Free::under(Path::new("/"), limits)
        }
        #[cfg(not(target_os = "linux"))]
        None
    }

    /// The same by the files below `root`, and by limits on address space and data.
    pub fn under(root: &Path, [address, data]: [Option<u64>; 2]) -> Option<Free> {
        let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
        let status = std::fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
        let swap = kilobytes(&meminfo, "SwapFree:").unwrap_or(0);
        let mut all = Vec::new();
        if let Some(available) = kilobytes(&meminfo, "MemAvailable:") {
            all.push(Free { bytes: available.saturating_add(swap), limit: "what the machine has free".to_owned() });
        }
        all.extend(groups(root, swap));
        for (limit, key, name) in [(address, "VmSize:", "ulimit -v"), (data, "VmData:", "ulimit -d")] {
            if let Some(limit) = limit {
                let bytes = limit.saturating_sub(kilobytes(&status, key).unwrap_or(0));
                all.push(Free { bytes, limit: format!("{name} {}", limit / 1024) });
            }
        }
        all.into_iter().min_by_key(|free| free.bytes)
    }
}

/// The value of a line of /proc, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What each control group above this process leaves it.
fn groups(root: &Path, swap: u64) -> Vec<Free> {
    let table = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut all = Vec::new();
    for line in table.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let mounts: &[&str] = match controllers.split(',').any(|name| name == "memory") {
            true => &["sys/fs/cgroup/memory"],
            false if controllers.is_empty() => &["sys/fs/cgroup", "sys/fs/cgroup/unified"],
            false => continue,
        };
        // Within a container the group's own files may lie at the mount itself, and its path be that outside.
        let path: PathBuf = Path::new(path).components().filter(|part| matches!(part, Component::Normal(_))).collect();
        for mount in mounts {
            for group in path.ancestors() {
                all.extend(group_free(&root.join(mount).join(group), &Path::new("/").join(group), swap));
            }
        }
    }
    all
}

/// What one group leaves; `None` without a limit.
fn group_free(folder: &Path, name: &Path, swap: u64) -> Option<Free> {
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).ok();
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let stat = read("memory.stat").unwrap_or_default();
    let of_stat = |keys: [&str; 2]| -> u64 {
        let values = stat.lines().filter_map(|line| line.split_once(' ')).filter(|(key, _)| keys.contains(key));
        values.filter_map(|(_, value)| value.trim().parse::<u64>().ok()).sum()
    };
    // Pages of files are taken back before anything fails.
    let (limit, used, files, swapped) = match number("memory.max") {
        Some(limit) => {
            let swapped = read("memory.swap.max").map_or(swap, |text| text.trim().parse().unwrap_or(swap));
            (limit, number("memory.current")?, of_stat(["inactive_file", "active_file"]), swapped)
        }
        None => {
            let limit = number("memory.limit_in_bytes")?;
            let both = number("memory.memsw.limit_in_bytes").unwrap_or(u64::MAX);
            let files = of_stat(["total_inactive_file", "total_active_file"]);
            (limit, number("memory.usage_in_bytes")?, files, both.saturating_sub(limit))
        }
    };
    // No limit is written as the largest number of pages.
    (limit < 1 << 60).then(|| Free {
        bytes: limit.saturating_sub(used.saturating_sub(files)).saturating_add(swapped.min(swap)),
        limit: format!("the limit of the control group {}", name.display()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable:     800 kB\nSwapFree:  100 kB\n");
    const STATUS: (&str, &str) = ("proc/self/status", "Name:\tx\nVmSize:\t 300 kB\nVmData:\t 200 kB\n");

    #[test]
    fn the_least_of_all_limits_counts() {
        let machine = root(&[MEMINFO, STATUS]);
        let free = |limits| Free::under(machine.path(), limits).unwrap();
        assert_eq!(free([None; 2]).bytes, 900 << 10);
        assert_eq!(free([Some(1000 << 10), None]).bytes, 700 << 10);
        let told = free([Some(1000 << 10), Some(500 << 10)]).to_string();
        assert_eq!(told, "0 MB can be had (ulimit -d 500)");
        assert_eq!(free([Some(1), None]).bytes, 0);
        assert!(Free::under(root(&[]).path(), [None; 2]).is_none());
    }

    #[test]
    fn control_groups_of_both_versions_are_read() {
        let v2 = root(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/box/../box\n"),
            ("sys/fs/cgroup/pod/memory.max", "600000\n"),
            ("sys/fs/cgroup/pod/memory.current", "500000\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 200000\nactive_file 100000\n"),
            ("sys/fs/cgroup/pod/memory.swap.max", "7\n"),
            ("sys/fs/cgroup/pod/box/box/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/box/box/memory.current", "9\n"),
        ]);
        let free = Free::under(v2.path(), [None; 2]).unwrap();
        assert_eq!(free, Free { bytes: 400_007, limit: "the limit of the control group /pod".to_owned() });
        // As in a container that sees its own group as the root, and its path as outside.
        let inside = root(&[
            MEMINFO,
            ("proc/self/cgroup", "12:cpu,memory:/docker/0123\n0::/docker/0123\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "300000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "200000\n"),
            ("sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", "300000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50000\ntotal_active_file 0\n"),
        ]);
        assert_eq!(Free::under(inside.path(), [None; 2]).unwrap().bytes, 150_000);
        let unlimited = root(&[
            MEMINFO,
            ("proc/self/cgroup", "4:memory:/a\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1\n"),
        ]);
        assert_eq!(Free::under(unlimited.path(), [None; 2]).unwrap().bytes, 900 << 10);
    }
}
