/*
 * PID 1 of the guest kernel's own test: asks the kernel for everything a
 * workload would miss, prints a line per question, and powers off.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/if_alg.h>
#include <linux/landlock.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/rtnetlink.h>
#include <linux/seccomp.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int failed, passed;

static void result(const char *name, int ok)
{
    printf("%s %s%s%s\n", ok ? "ok" : "FAILED", name, ok ? "" : ": ", ok ? "" : strerror(errno));
    if (ok)
        passed++;
    else
        failed++;
}

/* Whether the file has a line, or a word on one, that equals `word`. */
static int has_word(const char *path, const char *word)
{
    char text[65536];
    int fd = open(path, O_RDONLY);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (size < 0)
        return 0;
    text[size] = 0;
    for (char *token = strtok(text, " \t\n"); token; token = strtok(NULL, " \t\n"))
        if (!strcmp(token, word))
            return 1;
    errno = ENOENT;
    return 0;
}

static void words(const char *path, const char *const *list)
{
    char name[128];
    for (; *list; list++) {
        snprintf(name, sizeof name, "%s in %s", *list, path);
        result(name, has_word(path, *list));
    }
}

static void files(const char *const *list)
{
    for (; *list; list++)
        result(*list, access(*list, F_OK) == 0);
}

static void sockets(const char *name, int family, int type, int protocol)
{
    int fd = socket(family, type, protocol);
    result(name, fd >= 0);
    if (fd >= 0)
        close(fd);
}

static void mounts(const char *type, const char *options)
{
    char name[64];
    mkdir("/tmp/mnt", 0755);
    snprintf(name, sizeof name, "mount %s", type);
    result(name, mount(type, "/tmp/mnt", type, 0, options) == 0);
    umount("/tmp/mnt");
}

/* Makes an interface of the kind by rtnetlink, and removes it with its namespace. */
static void interface(const char *kind, const char *lower)
{
    struct {
        struct nlmsghdr header;
        struct ifinfomsg info;
        char attributes[256];
    } request = { .header = { .nlmsg_type = RTM_NEWLINK, .nlmsg_flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK } };
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        char rest[512];
    } reply;
    char name[64];
    struct rtattr *attribute = (void *)request.attributes, *nested;
    int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);

    if (lower) {
        int index = if_nametoindex(lower);
        attribute->rta_type = IFLA_LINK;
        attribute->rta_len = RTA_LENGTH(4);
        memcpy(RTA_DATA(attribute), &index, 4);
        attribute = (void *)attribute + RTA_ALIGN(attribute->rta_len);
    }
    attribute->rta_type = IFLA_LINKINFO;
    nested = RTA_DATA(attribute);
    nested->rta_type = IFLA_INFO_KIND;
    nested->rta_len = RTA_LENGTH(strlen(kind));
    memcpy(RTA_DATA(nested), kind, strlen(kind));
    void *end = (void *)nested + RTA_ALIGN(nested->rta_len);
    if (!strcmp(kind, "vlan") || !strcmp(kind, "vrf") || !strcmp(kind, "vxlan") || !strcmp(kind, "geneve")) {
        /* These want a number: VLAN 5, table 5, network 5. */
        struct rtattr *data = end, *number = RTA_DATA(data);
        data->rta_type = IFLA_INFO_DATA | NLA_F_NESTED;
        number->rta_type = 1;
        int five = 5, size = strcmp(kind, "vlan") ? 4 : 2;
        number->rta_len = RTA_LENGTH(size);
        memcpy(RTA_DATA(number), &five, size);
        data->rta_len = RTA_LENGTH(RTA_ALIGN(number->rta_len));
        end = (void *)data + RTA_ALIGN(data->rta_len);
    }
    attribute->rta_len = end - (void *)attribute;
    request.header.nlmsg_len = end - (void *)&request;
    snprintf(name, sizeof name, "interface %s", kind);
    if (send(fd, &request, request.header.nlmsg_len, 0) < 0 || recv(fd, &reply, sizeof reply, 0) < 0) {
        result(name, 0);
    } else {
        errno = -reply.error.error;
        result(name, reply.error.error == 0);
    }
    close(fd);
}

static void namespaces(void)
{
    static const struct { const char *name; int flag; } list[] = {
        { "namespace ipc", CLONE_NEWIPC }, { "namespace uts", CLONE_NEWUTS }, { "namespace net", CLONE_NEWNET },
        { "namespace pid", CLONE_NEWPID }, { "namespace mnt", CLONE_NEWNS }, { "namespace user", CLONE_NEWUSER },
        { "namespace cgroup", CLONE_NEWCGROUP }, { "namespace time", 0x80 },
    };
    for (unsigned i = 0; i < sizeof list / sizeof *list; i++) {
        int status;
        pid_t child = fork();
        if (child == 0)
            _exit(unshare(list[i].flag) ? errno : 0);
        waitpid(child, &status, 0);
        errno = WEXITSTATUS(status);
        result(list[i].name, status == 0);
    }
}

static void system_calls(void)
{
    char ring[256] = { 0 };
    result("io_uring", syscall(SYS_io_uring_setup, 4, ring) >= 0);
    result("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC) >= 0);
    result("landlock", syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION) > 0);
    result("keyrings", syscall(SYS_add_key, "user", "husk", "x", 1, -3) > 0);
    result("memfd", memfd_create("husk", MFD_ALLOW_SEALING) >= 0);
    result("memfd_secret", syscall(447, 0) >= 0);
    result("inotify", inotify_init1(0) >= 0);
    result("fanotify", fanotify_init(FAN_CLASS_CONTENT, O_RDONLY) >= 0);
    result("aio", syscall(SYS_io_setup, 1, &(unsigned long){ 0 }) == 0);
    result("System V shared memory", shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600) >= 0);
    result("membarrier", syscall(SYS_membarrier, 0, 0, 0) >= 0);
    result("kcmp", syscall(SYS_kcmp, getpid(), getpid(), 0, 0, 0) >= 0);
    result("mbind", syscall(SYS_mbind, 0, 0, 0, NULL, 0, 0) == 0);
    result("name_to_handle_at", syscall(SYS_name_to_handle_at, AT_FDCWD, "/", &(struct { unsigned bytes; int type; char handle[128]; }){ 128, 0, { 0 } }, &(int){ 0 }, 0) == 0);
    struct perf_event_attr perf = { .type = PERF_TYPE_SOFTWARE, .size = sizeof perf, .config = PERF_COUNT_SW_TASK_CLOCK };
    result("perf_event_open", syscall(SYS_perf_event_open, &perf, 0, -1, -1, 0) >= 0);
    struct bpf_insn program[] = { { .code = 0xb7, .dst_reg = 0, .imm = 1 }, { .code = 0x95 } };
    union bpf_attr load = { .prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, .insn_cnt = 2, .insns = (unsigned long)program, .license = (unsigned long)"Apache-2.0" };
    result("BPF device program", syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load) >= 0);
    result("seccomp filters", syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &(unsigned){ SECCOMP_RET_USER_NOTIF }) == 0);
    struct timespec now;
    result("clock", clock_gettime(CLOCK_REALTIME, &now) == 0 && now.tv_sec > 1600000000);
    result("pkeys or none in this CPU", syscall(SYS_pkey_alloc, 0, 0) >= 0 || errno == ENOSPC);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/tmp", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("tmp", "/tmp", "tmpfs", 0, NULL);
    result("/dev/console", fcntl(1, F_GETFD) >= 0);

    words("/proc/filesystems", (const char *const[]){ "ext4", "xfs", "erofs", "overlay", "fuse", "virtiofs", "tmpfs", "devpts", "mqueue", "hugetlbfs", "cgroup2", "bpf", "binfmt_misc", "securityfs", NULL });
    mounts("tmpfs", "size=1m,mode=1777");
    mounts("mqueue", NULL);
    mounts("hugetlbfs", NULL);
    mounts("devpts", "newinstance,ptmxmode=0666");
    mounts("binfmt_misc", NULL);
    mounts("bpf", NULL);
    mounts("securityfs", NULL);
    mount("securityfs", "/sys/kernel/security", "securityfs", 0, NULL);
    words("/sys/kernel/security/lockdown", (const char *const[]){ "[confidentiality]", NULL });
    mkdir("/tmp/lower", 0755), mkdir("/tmp/upper", 0755), mkdir("/tmp/work", 0755);
    mounts("overlay", "lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work");
    mkdir("/tmp/cgroup", 0755);
    result("mount cgroup2", mount("cgroup2", "/tmp/cgroup", "cgroup2", 0, NULL) == 0);
    words("/tmp/cgroup/cgroup.controllers", (const char *const[]){ "cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc", NULL });
    int control = open("/tmp/cgroup/cgroup.subtree_control", O_WRONLY);
    result("enabling controllers", write(control, "+cpuset +cpu +io +memory +hugetlb +pids", 39) == 39);
    mkdir("/tmp/cgroup/a", 0755);
    files((const char *const[]){ "/tmp/cgroup/a/cpu.max", "/tmp/cgroup/a/cpu.weight", "/tmp/cgroup/a/memory.max", "/tmp/cgroup/a/memory.swap.max", "/tmp/cgroup/a/memory.pressure", "/tmp/cgroup/a/io.max", "/tmp/cgroup/a/io.weight", "/tmp/cgroup/a/hugetlb.2MB.max", "/tmp/cgroup/a/cgroup.freeze", "/tmp/cgroup/a/cgroup.kill",
        "/dev/null", "/dev/fuse", "/dev/net/tun", "/dev/loop-control", "/dev/ptmx", "/dev/hwrng",
        "/proc/config.gz", "/proc/sys/net/ipv6/conf/all/forwarding", "/proc/self/io", "/proc/self/smaps", "/proc/pressure/memory", "/proc/sysrq-trigger",
        "/sys/devices/system/node/node0", "/sys/bus/pci/rescan", "/sys/devices/system/cpu/online", "/sys/kernel/mm/transparent_hugepage/enabled", NULL });

    sockets("socket IPv4", AF_INET, SOCK_STREAM, 0);
    sockets("socket IPv6", AF_INET6, SOCK_STREAM, 0);
    sockets("socket SCTP", AF_INET, SOCK_STREAM, 132);
    sockets("socket MPTCP", AF_INET, SOCK_STREAM, 262);
    sockets("socket packet", AF_PACKET, SOCK_RAW, 0);
    sockets("socket vsock", AF_VSOCK, SOCK_STREAM, 0);
    sockets("socket AF_XDP", 44, SOCK_RAW, 0);
    sockets("socket netfilter", AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER);
    sockets("socket xfrm", AF_NETLINK, SOCK_RAW, NETLINK_XFRM);
    int alg = socket(AF_ALG, SOCK_SEQPACKET, 0);
    struct sockaddr_alg hash = { .salg_family = AF_ALG, .salg_type = "hash", .salg_name = "sha256" };
    result("socket AF_ALG sha256", bind(alg, (void *)&hash, sizeof hash) == 0);

    namespaces();
    system_calls();

    unshare(CLONE_NEWNET);
    static const char *const kinds[] = { "dummy", "veth", "bridge", "ifb", "wireguard", "vxlan", "geneve", "vrf", "tun", NULL };
    for (const char *const *kind = kinds; *kind; kind++)
        if (strcmp(*kind, "tun"))
            interface(*kind, NULL);
    interface("vlan", "dummy0");
    interface("macvlan", "dummy0");
    interface("ipvlan", "veth0");

    printf("guest kernel: %d passed, %d failed\n", passed, failed);
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}
