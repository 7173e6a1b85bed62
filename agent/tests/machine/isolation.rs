//! What a container may see and do.

use husk_protocol::agent::{DeviceNumber, UpdateResourcesRequest};
use serde_json::json;
use ttrpc::Code;

use crate::agent::{context, status};
use crate::agent_test;

agent_test! {
    async fn a_container_sees_only_its_own(agent: Agent) {
        assert_eq!(agent.shell("hostname").await, "box\n");
        assert_eq!(agent.shell("echo $$").await, "1\n");
        assert_eq!(agent.shell("echo /proc/[0-9]*").await, "/proc/1\n");
        assert_eq!(agent.shell("grep ^0: /proc/self/cgroup").await, "0::/\n");
        assert_eq!(agent.shell("ls /").await, "bin\ndev\netc\nproc\nroot\nsys\ntmp\nusr\n");
        assert_eq!(agent.shell("cd /../..; ls -d /run 2>&1 || true").await, "ls: /run: No such file or directory\n");
        // No descriptor of ours: the three streams, and ls's own directory.
        assert_eq!(agent.shell("ls /proc/self/fd").await, "0\n1\n2\n3\n");
    }
}

agent_test! {
    async fn dev_has_what_programs_expect(agent: Agent) {
        let listing = agent.shell("cd /dev; ls").await;
        let expected = "core full fd mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero";
        for name in expected.split(' ').filter(|name| *name != "core") {
            assert!(listing.lines().any(|line| line == name), "{name}: {listing}");
        }
        assert_eq!(agent.shell("head -c 3 /dev/zero | wc -c; echo x > /dev/null; readlink /dev/fd; readlink /dev/ptmx").await, "3\n/proc/self/fd\npts/ptmx\n");
    }
}

agent_test! {
    async fn mounts_have_their_options(agent: Agent) {
        let volume = agent.directory.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("file"), "text").unwrap();
        let mut spec = agent.spec(&["/bin/sh", "-c", "cat /data/file /one; cat /by-type/file; touch /data/x; grep -E ' /(data|one|scratch) ' /proc/self/mountinfo | cut -d' ' -f5,6; touch /scratch/y && echo ok; ls /etc/old"]);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/data", "type": "bind", "source": volume, "options": ["rbind", "rprivate", "ro", "nosuid"]}));
        mounts.push(json!({"destination": "/one", "type": "bind", "source": volume.join("file"), "options": ["bind", "nodev", "rro"]}));
        mounts.push(json!({"destination": "/by-type", "type": "rbind", "source": volume}));
        mounts.push(json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=1m", "mode=700"]}));
        mounts.push(json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}));
        std::fs::create_dir(agent.rootfs().join("etc/old")).unwrap();
        std::fs::write(agent.rootfs().join("etc/old/kept"), "").unwrap();
        let (code, stdout, stderr) = agent.output(&spec).await;
        assert_eq!(code, 0, "{stderr}");
        assert!(stdout.starts_with("texttexttext/data ro,nosuid"), "{stdout}");
        assert!(stdout.contains("/one ro,nodev"), "{stdout}");
        assert!(stdout.contains("/scratch rw,nosuid"), "{stdout}");
        assert!(stdout.ends_with("ok\nkept\n"), "{stdout}");
        assert!(stderr.contains("Read-only file system"), "{stderr}");
        assert_eq!(std::fs::read_dir(agent.rootfs().join("etc/old")).unwrap().count(), 1);
        let mut spec = agent.spec(&["/bin/true"]);
        let mapped = json!({"destination": "/data", "type": "bind", "source": volume, "options": ["rbind"], "uidMappings": [{"containerID": 0, "hostID": 100_000, "size": 1}]});
        spec["mounts"].as_array_mut().unwrap().push(mapped);
        let error = agent.create("x", &spec).await.err().unwrap();
        assert!(status(error).1.contains("/data maps ids"));
    }
}

agent_test! {
    async fn a_hostile_image_gets_nothing_mounted_outside(agent: Agent) {
        let outside = agent.directory.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        let volume = agent.directory.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("file"), "text").unwrap();
        std::os::unix::fs::symlink(&outside, agent.rootfs().join("data")).unwrap();
        std::os::unix::fs::symlink("../../../../../../../../tmp/husk-escape", agent.rootfs().join("deep")).unwrap();
        let mut spec = agent.spec(&["/bin/sh", "-c", "cat /data/sub/file /deep/file"]);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/data/sub", "type": "bind", "source": volume, "options": ["rbind"]}));
        mounts.push(json!({"destination": "/deep", "type": "bind", "source": volume, "options": ["rbind"]}));
        assert_eq!(agent.output(&spec).await, (0, "texttext".to_owned(), String::new()));
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert!(!std::path::Path::new("/tmp/husk-escape").exists());
        // A link at /proc would hide the real one from the masked paths.
        std::fs::create_dir(agent.rootfs().join("elsewhere")).unwrap();
        std::fs::remove_dir(agent.rootfs().join("proc")).unwrap();
        std::os::unix::fs::symlink("elsewhere", agent.rootfs().join("proc")).unwrap();
        let error = agent.create("x", &agent.spec(&["/bin/true"])).await.err().unwrap();
        assert!(status(error).1.contains("symbolic link"));
        assert_eq!(agent.cgroups(), Vec::<String>::new());
    }
}

agent_test! {
    async fn a_working_directory_outside_is_refused(agent: Agent) {
        for fd in 3..12 {
            let mut spec = agent.spec(&["/bin/sh", "-c", "ls ../../.."]);
            spec["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}"));
            let created = agent.create("x", &spec).await;
            assert!(created.is_err(), "fd {fd}");
        }
        let mut spec = agent.spec(&["/bin/pwd"]);
        spec["process"]["cwd"] = json!("/made/for/it");
        assert_eq!(agent.output(&spec).await.1, "/made/for/it\n");
    }
}

agent_test! {
    async fn masked_and_read_only_paths_hold(agent: Agent) {
        assert_eq!(agent.shell("wc -c < /proc/timer_list; wc -c < /proc/keys").await, "0\n0\n");
        assert_eq!(agent.shell("ls -A /sys/firmware | wc -l").await, "0\n");
        let spec = agent.spec(&["/bin/sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]);
        let (code, _, stderr) = agent.output(&spec).await;
        assert!(code != 0 && stderr.contains("Read-only"), "{stderr}");
        let spec = agent.spec(&["/bin/sh", "-c", "umount /proc/sys; umount /proc/keys"]);
        let (code, _, stderr) = agent.output(&spec).await;
        assert!(code != 0 && stderr.contains("not permitted"), "{stderr}");
    }
}

agent_test! {
    async fn a_read_only_root_is(agent: Agent) {
        let mut spec = agent.spec(&["/bin/sh", "-c", "touch /x; touch /dev/shm/y && echo shm"]);
        spec["root"]["readonly"] = json!(true);
        let (_, stdout, stderr) = agent.output(&spec).await;
        assert!(stderr.contains("/x: Read-only file system"), "{stderr}");
        assert_eq!(stdout, "shm\n");
        assert!(!agent.rootfs().join("x").exists());
    }
}

agent_test! {
    async fn capabilities_are_those_of_the_spec(agent: Agent) {
        let status_of = "grep -E 'Cap|NoNewPrivs|Groups|Uid' /proc/self/status";
        let mut spec = agent.spec(&["/bin/sh", "-c", status_of]);
        spec["process"]["capabilities"] = json!({"bounding": ["CAP_KILL", "CAP_NET_RAW"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL", "CAP_NET_RAW"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]});
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 63});
        spec["process"]["noNewPrivileges"] = json!(false);
        let stdout = agent.output(&spec).await.1;
        let field = |name: &str| {
            let line = stdout.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_start_matches(':').split_whitespace().collect::<Vec<_>>().join(" ")
        };
        // For another user than root only ambient ones survive the execution.
        assert_eq!(field("CapInh"), "0000000000000020");
        assert_eq!(field("CapPrm"), "0000000000000020");
        assert_eq!(field("CapEff"), "0000000000000020");
        assert_eq!(field("CapBnd"), "0000000000002020");
        assert_eq!(field("CapAmb"), "0000000000000020");
        assert_eq!(field("Uid"), "1000 1000 1000 1000");
        assert_eq!(field("Groups"), "5 6");
        assert_eq!(field("NoNewPrivs"), "0");
        let none = agent.spec(&["/bin/sh", "-c", status_of]);
        assert!(agent.output(&none).await.1.contains("NoNewPrivs:\t1"));
    }
}

agent_test! {
    async fn process_attributes_are_set(agent: Agent) {
        let mut spec = agent.spec(&["/bin/sh", "-c", "umask; ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj; echo $HOME; uname -m"]);
        spec["process"]["user"]["umask"] = json!(0o27);
        spec["process"]["oomScoreAdj"] = json!(321);
        spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        assert_eq!(agent.output(&spec).await.1, "0027\n512\n1024\n321\n/root\ni686\n");
        spec["process"]["args"] = json!(["/bin/sh", "-c", "echo ready; exec sleep 1000"]);
        agent.run("a", &spec).await.read_until("ready").await;
        let process = json!({"user": {"uid": 0, "gid": 0}, "args": ["uname", "-m"], "env": ["PATH=/bin"], "cwd": "/"});
        let exec = agent.exec("a", "e", &process).await.unwrap();
        assert_eq!(crate::agent::read_all(exec.stdout).await, "i686\n");
        agent.delete("a").await;
        let mut spec = agent.spec(&["/bin/sh", "-c", "echo $HOME $A"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["env"] = json!(["PATH=/bin", "A=1", "A=2"]);
        assert_eq!(agent.output(&spec).await.1, "/home/user 2\n");
    }
}

agent_test! {
    async fn the_home_directory_is_found_in_any_image(agent: Agent) {
        let spec = agent.spec(&["/bin/sh", "-c", "echo $HOME"]);
        let passwd = agent.rootfs().join("etc/passwd");
        // In Latin-1, as old tools wrote names.
        std::fs::write(&passwd, b"root:x:0:0:Ren\xe9:/home/rene:/bin/sh\n").unwrap();
        assert_eq!(agent.output(&spec).await.1, "/home/rene\n");
        // Nobody will ever write to it.
        std::fs::remove_file(&passwd).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&passwd).status().unwrap();
        assert!(made.success());
        assert_eq!(agent.output(&spec).await.1, "/\n");
    }
}

agent_test! {
    async fn seccomp_filters_apply_with_and_without_no_new_privs(agent: Agent) {
        for no_new_privileges in [true, false] {
            let mut spec = agent.spec(&["/bin/sh", "-c", "mkdir /tmp/d; echo $?; uname >/dev/null; grep Seccomp: /proc/self/status"]);
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [
                    {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
                    {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 16, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 17, "op": "SCMP_CMP_EQ"}]},
                ],
            });
            let (_, stdout, stderr) = agent.output(&spec).await;
            assert_eq!(stdout, "1\nSeccomp:\t2\n");
            assert!(stderr.contains("Permission denied"), "{stderr}");
        }
        // The other way round, as RuntimeDefault is.
        let names = "access arch_prctl brk clone close dup2 execve exit exit_group fcntl fstat futex getcwd getegid geteuid getgid getpid getppid getrandom getuid ioctl lseek madvise mmap mprotect munmap newfstatat open openat prctl prlimit64 read readlink readlinkat rseq rt_sigaction rt_sigprocmask rt_sigreturn set_robust_list set_tid_address stat uname wait4 write";
        let names: Vec<&str> = names.split(' ').collect();
        let mut spec = agent.spec(&["/bin/sh", "-c", "echo fine; mkdir /tmp/e"]);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
        });
        let (_, stdout, stderr) = agent.output(&spec).await;
        assert_eq!(stdout, "fine\n", "{stderr}");
        assert!(stderr.contains("not permitted"), "{stderr}");
        let mut spec = agent.spec(&["/bin/true"]);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
        let error = agent.create("x", &spec).await.err().unwrap();
        assert!(status(error).1.contains("SCMP_ACT_NOTIFY"));
    }
}

agent_test! {
    async fn a_program_that_cannot_run_is_told_past_a_seccomp_filter(agent: Agent) {
        use std::os::unix::fs::PermissionsExt;
        // The last step fails, where the filter holds already.
        let script = agent.rootfs().join("bin/script");
        std::fs::write(&script, "#!/bin/not-there\n").unwrap();
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        let mut spec = agent.spec(&["/bin/script"]);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["sendmsg", "sendto", "sendmmsg"], "action": "SCMP_ACT_ERRNO"}],
        });
        agent.create("a", &spec).await.unwrap();
        let error = agent.start_container("a").await.err().unwrap();
        assert!(status(error).1.contains("/bin/script"));
        spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
        agent.run("b", &spec).await;
        let exec = json!({"user": {"uid": 0, "gid": 0}, "args": ["script"], "env": ["PATH=/bin"], "cwd": "/"});
        let error = agent.exec("b", "e", &exec).await.err().unwrap();
        assert!(status(error).1.contains("/bin/script"));
        agent.delete("b").await;
    }
}

agent_test! {
    async fn user_namespaces_map_ids(agent: Agent) {
        let line = "id -u; cat /proc/self/uid_map; touch /tmp/made; echo x > /dev/null && head -c1 /dev/zero | wc -c; hostname; mount | grep -c -E ' /(proc|sys|dev/mqueue) '; touch /dev/shm/a && echo shm";
        let mut spec = agent.spec(&["/bin/sh", "-c", line]);
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["process"]["oomScoreAdj"] = json!(500);
        std::os::unix::fs::chown(agent.rootfs().join("tmp"), Some(100_000), Some(100_000)).unwrap();
        for directory in ["dev", "proc", "sys"] {
            std::fs::create_dir(agent.rootfs().join(directory)).unwrap();
        }
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        std::fs::set_permissions(agent.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let (code, stdout, stderr) = agent.output(&spec).await;
        let lines: Vec<&str> = stdout.lines().map(str::trim).collect();
        assert_eq!((code, lines[0]), (0, "0"), "{stdout}{stderr}");
        assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["0", "100000", "65536"]);
        assert_eq!(&lines[2..], ["1", "box", "3", "shm"], "{stderr}");
        let made = std::fs::metadata(agent.rootfs().join("tmp/made")).unwrap();
        assert_eq!(made.uid(), 100_000);
        spec["process"]["args"] = json!(["/bin/sh", "-c", "echo ready; exec sleep 1000"]);
        agent.run("u", &spec).await.read_until("ready").await;
        let exec = json!({"user": {"uid": 1000, "gid": 1000}, "args": ["sh", "-c", "id -u; cat /proc/1/comm; echo > /dev/stdout"], "env": ["PATH=/bin"], "cwd": "/"});
        let streams = agent.exec("u", "e", &exec).await.unwrap();
        assert_eq!(crate::agent::read_all(streams.stdout).await, "1000\nsleep\n\n");
        let exec = json!({"terminal": true, "user": {"uid": 0, "gid": 0}, "args": ["tty"], "env": ["PATH=/bin"], "cwd": "/"});
        let streams = agent.exec("u", "t", &exec).await.unwrap();
        assert_eq!(crate::agent::read_all(streams.stdout).await, "/dev/pts/0\r\n");
        agent.delete("u").await;
    }
}

agent_test! {
    async fn a_user_that_cannot_be_is_refused(agent: Agent) {
        for user in [json!({"uid": u32::MAX, "gid": 0}), json!({"uid": 0, "gid": u32::MAX})] {
            let mut spec = agent.spec(&["/bin/id"]);
            spec["process"]["user"] = user;
            let (code, text) = status(agent.create("x", &spec).await.err().unwrap());
            assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        }
    }
}

agent_test! {
    async fn a_filter_is_made_before_the_limits_hold(agent: Agent) {
        let mut spec = agent.spec(&["/bin/sh", "-c", "ulimit -f; mkdir /tmp/d; exec sleep 1000"]);
        // In a user namespace limits are set before it is entered.
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        for directory in ["dev", "proc", "sys"] {
            std::fs::create_dir(agent.rootfs().join(directory)).unwrap();
        }
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(agent.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let rlimits = json!([{"type": "RLIMIT_FSIZE", "hard": 0, "soft": 0}]);
        spec["process"]["rlimits"] = rlimits.clone();
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
        });
        let mut streams = agent.run("a", &spec).await;
        streams.read_until("0\n").await;
        let exec = json!({"user": {"uid": 0, "gid": 0}, "args": ["mkdir", "/tmp/d"], "env": ["PATH=/bin"], "cwd": "/", "rlimits": rlimits});
        let streams = agent.exec("a", "e", &exec).await.unwrap();
        let stderr = crate::agent::read_all(streams.stderr).await;
        assert!(stderr.contains("Operation not permitted"), "{stderr}");
        agent.delete("a").await;
    }
}

agent_test! {
    async fn devices_are_filtered(agent: Agent) {
        // Nodes may be there, their use is not allowed: what the filter is for.
        let line = "mknod /tmp/ram b 1 0; cat /tmp/ram; mknod /tmp/tun c 10 200; cat /tmp/tun; echo null > /dev/null && echo fine; rm /tmp/ram /tmp/tun";
        let mut spec = agent.spec(&["/bin/sh", "-c", line]);
        // Rules that forbid, rules that allow something else, and none at all.
        for resources in [
            json!({"devices": [{"allow": false, "access": "rwm"}]}),
            json!({"devices": [{"allow": false}, {"allow": true, "type": "b", "major": 1, "minor": 0, "access": "rwm"}]}),
            json!({}),
            json!(null),
        ] {
            spec["linux"]["resources"] = resources;
            let (_, stdout, stderr) = agent.output(&spec).await;
            assert_eq!(stdout, "fine\n");
            assert!(stderr.contains("can't open '/tmp/ram': Operation not permitted"), "{stderr}");
            assert!(stderr.contains("can't open '/tmp/tun': Operation not permitted"), "{stderr}");
        }
    }
}

agent_test! {
    async fn rules_for_devices_can_be_changed(agent: Agent) {
        let line = "mknod /tmp/tun c 10 200; echo made; while read line; do dd if=/tmp/tun count=0 >/dev/null 2>&1 && echo open || echo closed; done";
        let mut spec = agent.spec(&["/bin/sh", "-c", line]);
        spec["linux"]["resources"] = json!({"devices": [{"allow": false}]});
        let mut streams = agent.run("a", &spec).await;
        streams.read_until("made").await;
        let everything = json!([{"allow": true}]);
        // The second one has words after one that speaks of all.
        let all_but_blocks = json!([{"allow": true}, {"allow": false, "type": "b"}]);
        for (rules, answer) in [
            (json!([]), "closed"),
            (all_but_blocks, "open"),
            (json!([{"allow": false}]), "closed"),
            (everything, "open"),
            (json!([]), "open"),
            (json!([{"allow": false}]), "closed"),
        ] {
            let request = UpdateResourcesRequest {
                container_id: "a".to_owned(),
                oci_resources: json!({"devices": rules}).to_string().into_bytes(),
                ..Default::default()
            };
            agent.client.update_resources(context(), &request).await.unwrap();
            streams.write("\n").await;
            let seen = streams.read_until("e").await + &streams.read_until("\n").await;
            assert!(seen.trim() == answer, "{seen} with {rules}");
        }
        agent.delete("a").await;
    }
}

agent_test! {
    async fn block_devices_of_the_host_are_left_out(agent: Agent) {
        let mut spec = agent.spec(&["/bin/sh", "-c", "ls /dev/disk /dev/fuse"]);
        spec["linux"]["devices"] = json!([
            {"path": "/dev/disk", "type": "b", "major": 254, "minor": 16},
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
        ]);
        assert_eq!(agent.output(&spec).await.1, "/dev/fuse\n");
    }
}

agent_test! {
    async fn a_character_device_is_the_guests_of_that_name(agent: Agent) {
        // As if the host numbered them otherwise.
        let number = |minor: u32, name: &str| {
            let mut number = DeviceNumber { major: 4000, minor, ..Default::default() };
            number.set_character_name(name.to_owned());
            number
        };
        let mut spec = agent.spec(&["/bin/sh", "-c", "head -c 3 /dev/nothing | wc -c; head -c 3 /dev/much | wc -c"]);
        spec["linux"]["devices"] = json!([
            {"path": "/dev/nothing", "type": "c", "major": 4000, "minor": 1},
            {"path": "/dev/much", "type": "c", "major": 4000, "minor": 2},
        ]);
        let numbers = vec![number(1, "null"), number(2, "zero")];
        let streams = agent.create_as("a", &spec, |request| request.devices = numbers).await.unwrap();
        agent.start_container("a").await.unwrap();
        assert_eq!(crate::agent::read_all(streams.stdout).await, "0\n3\n");
        agent.wait("a", "").await;
        agent.delete("a").await;

        let numbers = vec![number(1, "nvidia/0"), number(2, "zero")];
        let refused = agent.create_as("a", &spec, |request| request.devices = numbers).await;
        let (code, text) = crate::agent::status(refused.err().unwrap());
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(text.contains("/dev/nothing: the guest has no character device \"nvidia/0\""), "{text}");
    }
}

agent_test! {
    async fn a_container_may_have_all_devices_of_the_guest(agent: Agent) {
        let mut spec = agent.spec(&["/bin/sh", "-c", "test -c /dev/full && ls -d /dev/fuse /dev/console /dev/pts/ptmx"]);
        spec["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
        let streams = agent.create_as("a", &spec, |request| request.all_devices = true).await.unwrap();
        agent.start_container("a").await.unwrap();
        let text = crate::agent::read_all(streams.stdout).await;
        assert!(text.contains("/dev/fuse\n") && !text.contains("/dev/console"), "{text}");
        agent.wait("a", "").await;
        agent.delete("a").await;
    }
}

agent_test! {
    async fn sysctls_of_its_own_namespaces_are_set(agent: Agent) {
        let mut spec = agent.spec(&["/bin/sh", "-c", "cat /proc/sys/kernel/shmmni /proc/sys/fs/mqueue/msg_max"]);
        spec["linux"]["sysctl"] = json!({"kernel.shmmni": "2048", "fs.mqueue.msg_max": "77"});
        assert_eq!(agent.output(&spec).await.1, "2048\n77\n");
        assert_ne!(std::fs::read_to_string("/proc/sys/kernel/shmmni").unwrap().trim(), "2048");
    }
}
