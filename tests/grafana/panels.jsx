// A dashboard's panels as Grafana's own components draw them.
import React from 'react';
import { createRoot } from 'react-dom/client';
import {
  createTheme, dateTime, EventBusSrv, FieldColorModeId, FieldType, getDisplayProcessor, ThemeContext,
} from '@grafana/data';
import { PanelChrome, PanelContextProvider, TimeSeries } from '@grafana/ui';

const { dashboard, answers, from, to } = window.SAMPLE;
const theme = createTheme({ colors: { mode: 'light' } });

// What the time series panel has where a dashboard says nothing.
const CUSTOM = {
  drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, gradientMode: 'none',
  showPoints: 'auto', pointSize: 5, axisPlacement: 'auto', axisColorMode: 'text', axisLabel: '', barAlignment: 0,
  scaleDistribution: { type: 'linear' }, spanNulls: false, thresholdsStyle: { mode: 'off' },
  hideFrom: { legend: false, tooltip: false, viz: false },
};

// A little closer than Grafana's own grid.
const COLUMN = 1500 / 24;
const ROW = 34;

const legend = (format, labels) => format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => labels[label] ?? '');

function frame(panel, format, series, index) {
  const { defaults } = panel.fieldConfig;
  const name = legend(format, series.metric);
  const time = {
    name: 'Time', type: FieldType.time, config: {}, values: series.values.map(([at]) => at * 1000),
  };
  const value = {
    name, type: FieldType.number, labels: series.metric,
    config: {
      ...defaults, displayName: name, color: { mode: FieldColorModeId.PaletteClassic },
      custom: { ...CUSTOM, ...defaults.custom, stacking: { group: 'A', mode: 'none', ...defaults.custom?.stacking } },
    },
    state: { seriesIndex: index, displayName: name },
    values: series.values.map(([, number]) => Number(number)),
  };
  for (const field of [time, value]) {
    field.display = getDisplayProcessor({ field, theme });
  }
  return { name, refId: 'A', length: time.values.length, fields: [time, value] };
}

function Panel({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const [width, height] = [w * COLUMN - 8, h * ROW - 8];
  const series = panel.targets.flatMap((target, at) =>
    answers[panel.id][at].map((one) => [target.legendFormat, one]));
  const frames = series.map(([format, one], index) => frame(panel, format, one, index));
  const range = { from: dateTime(from * 1000), to: dateTime(to * 1000), raw: { from: '', to: '' } };
  return (
    <div style={{ position: 'absolute', left: x * COLUMN, top: y * ROW, width, height }}>
      <PanelChrome title={panel.title} width={width} height={height} padding="md">
        {(innerWidth, innerHeight) => (
          <TimeSeries frames={frames} structureRev={1} timeRange={range} timeZone={['utc']} width={innerWidth}
            height={innerHeight} legend={{ calcs: [], ...panel.options.legend }} options={panel.options} />
        )}
      </PanelChrome>
    </div>
  );
}

const context = {
  eventBus: new EventBusSrv(), eventsScope: 'global', sync: () => 0, onSeriesColorChange() {},
  canAddAnnotations: () => false,
};
createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <PanelContextProvider value={context}>
      {dashboard.panels.map((panel) => <Panel key={panel.id} panel={panel} />)}
    </PanelContextProvider>
  </ThemeContext.Provider>,
);
