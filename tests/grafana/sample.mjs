// A node's state directory with made-up pods that come and go:   sample.mjs DIR SECONDS
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const [dir, seconds] = process.argv.slice(2);
const state = path.join(dir, 'state/k8s.io');
fs.mkdirSync(state, { recursive: true });
fs.writeFileSync(path.join(dir, 'config.toml'), `state_dir = '${dir}/state'\n`);

// The same numbers each time.
let seed = 7;
const random = () => {
  seed = (seed * 48271) % 0x7fffffff;
  return seed / 0x7fffffff;
};
const between = (least, most) => least + random() * (most - least);
const one = (...all) => all[Math.floor(random() * all.length)];
const monotonic = () => Number(process.hrtime.bigint());

/** A process that has so many MiB, and what the state file has of it. */
function part(mib) {
  const script = `b=$(head -c ${mib}M /dev/zero | tr '\\0' x); read -r forever`;
  const child = spawn('bash', ['-c', script], { stdio: ['pipe', 'ignore', 'ignore'] });
  const fields = fs.readFileSync(`/proc/${child.pid}/stat`, 'utf8').split(') ').pop().split(' ');
  return { child, process: { pid: child.pid, start_ticks: Number(fields[19]) } };
}

/** Its stages and how long they take, seconds; a boot's guest, and a copy's. */
const stages = (boots) => [
  ['vmm_exec_ns', 0.012], ['vmm_spec_ns', 0.006], ['guest_entered_ns', 0.02],
  ['agent_ready_ns', boots ? 0.35 : 0.045], ['container_created_ns', 0.03], ['container_started_ns', 0.015],
];

class Pod {
  constructor(number) {
    this.dir = path.join(state, `sample-${number}`);
    fs.mkdirSync(this.dir);
    this.parts = [part(1), part(one(4, 10, 24)), part(2)];
    this.state = { shim: this.parts[0].process, timeline: { request_ns: monotonic() } };
    this.ends = monotonic() + between(20, 120) * 1e9;
    this.write();
  }

  write() {
    const text = JSON.stringify(this.state);
    fs.writeFileSync(path.join(this.dir, 'state.new'), text);
    fs.renameSync(path.join(this.dir, 'state.new'), path.join(this.dir, 'state.json'));
  }

  start() {
    const { timeline } = this.state;
    let at = timeline.request_ns;
    for (const [stage, took] of stages(random() < 0.25)) {
      at += Math.round(took * between(0.7, 1.6) * 1e9);
      timeline[stage] = at;
    }
    [this.state.vmm, this.state.file_server] = [this.parts[1].process, this.parts[2].process];
    this.state.machine = { vcpus: 1, memory_mib: one(256, 512) };
    this.write();
  }

  fail() {
    this.state.end = { kind: one('panicked', 'vmm-gone', 'reset'), reason: 'a sample', was_asked: false };
    this.parts[1].child.kill();
    this.write();
  }

  remove() {
    this.parts.forEach(({ child }) => child.kill());
    fs.rmSync(this.dir, { recursive: true });
  }
}

let pods = [];
process.on('SIGTERM', () => {
  pods.forEach((pod) => pod.remove());
  process.exit();
});
const end = monotonic() + Number(seconds) * 1e9;
for (let number = 0; monotonic() < end; number += 1) {
  if (pods.length < 12 && random() < 0.35) {
    const pod = new Pod(number);
    pods.push(pod);
    await sleep(300);
    pod.start();
  }
  for (const pod of pods.filter(({ ends }) => ends < monotonic())) {
    if (random() < 0.2) {
      pod.fail();
      await sleep(1200);
    }
    pod.remove();
    pods = pods.filter((other) => other !== pod);
  }
  await sleep(1000);
}
pods.forEach((pod) => pod.remove());
